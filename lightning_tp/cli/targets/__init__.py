"""What a TARGET of the command line stands for: a model with inputs and a loss, from a function, a script or a Hugging Face config."""
