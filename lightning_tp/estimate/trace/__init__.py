"""Trace one training step of one rank on the meta device."""
