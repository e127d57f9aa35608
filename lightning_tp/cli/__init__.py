"""The command line, `lightning-tp`."""
