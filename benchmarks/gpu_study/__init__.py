"""The sections of gpu.py: each is a function without arguments that returns what it found, as JSON."""
