"""Compare a sharded model with the same model in a single process."""
