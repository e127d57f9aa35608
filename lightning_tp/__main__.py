"""`python -m lightning_tp`: the command line `lightning-tp`."""

import sys

from lightning_tp.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
