"""Operators on sharded activations: split logits and their losses, random numbers, attention."""
