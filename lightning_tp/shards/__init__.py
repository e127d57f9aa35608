"""A parameter and its shard: state dicts, gradients, norms, optimizer states."""
