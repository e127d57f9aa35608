"""Run a model once and follow which weight's features each element of an activation depends on."""
