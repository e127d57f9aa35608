"""Find the calls in a model's code that have to change on shards, and how."""
