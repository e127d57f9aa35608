"""`python -m pretend_cuda [--devices N] [--waits] script.py ARGS..`: run a script on pretended GPUs."""

from __future__ import annotations

import argparse
import contextlib
import os
import runpy
import sys
from pathlib import Path

import pretend_cuda


def main() -> None:
    """Run the script; say what made the host wait, if asked to."""
    parser = argparse.ArgumentParser(prog="python -m pretend_cuda", description="Runs a script on pretended GPUs.")
    parser.add_argument("--devices", type=int, default=2, help="how many (default 2)")
    parser.add_argument("--waits", action="store_true", help="at the end, what made the host wait for the device, on stderr")
    parser.add_argument("--collectives", action="store_true", help="with them, the collectives")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    asked = parser.parse_args()
    pretend_cuda.install(asked.devices)
    sys.argv = [asked.script, *asked.arguments]
    sys.path[0] = str(Path(asked.script).resolve().parent)
    waits = pretend_cuda.HostWaits(asked.collectives)
    counted = asked.waits or asked.collectives
    try:
        with waits if counted else contextlib.nullcontext():
            runpy.run_path(asked.script, run_name="__main__")
    finally:
        if counted:
            print(f"What made the host wait, in process {os.getpid()}:\n{waits.table() or '  nothing'}", file=sys.stderr)


if __name__ == "__main__":
    main()
