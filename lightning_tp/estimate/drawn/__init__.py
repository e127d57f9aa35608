"""Plots, pictures and HTML reports of estimates and plans."""
