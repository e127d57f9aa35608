"""Trace one of each kind of repeated block, in place of all of them."""
