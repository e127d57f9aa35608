"""Find the activations between sharded layers that can be sharded along the sequence: sequence parallelism."""
