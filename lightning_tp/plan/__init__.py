"""Plans: rules as written, and as checked against a model."""
