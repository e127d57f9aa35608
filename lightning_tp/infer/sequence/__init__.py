"""Infer where activations can be sharded along the sequence."""
