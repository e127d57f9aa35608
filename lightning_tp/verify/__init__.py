"""Compare a split model with the same model in one process."""
