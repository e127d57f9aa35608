"""Run a module whose code hard-codes full sizes with local ones."""
