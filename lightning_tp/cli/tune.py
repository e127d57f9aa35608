"""The command `lightning-tp tune`: which mesh, micro-batch size and activation checkpointing are the fastest that fit."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from lightning_tp.cli import options
from lightning_tp.cli.parser import add_command
from lightning_tp.cli.targets.load import load
from lightning_tp.estimate.rank.settings import PRECISIONS
from lightning_tp.estimate.tune import tune

EXAMPLES = """\
  lightning-tp tune llama-3-8b/config.json --gpus 64 --hardware h100 --global-batch 512 --seq 8192
                                                                    which mesh, micro-batch size and checkpointing
"""


class Progress:
    """Print what is being computed, once it has taken a few seconds: on a terminal one line that is erased at the end, else a line each."""

    QUIET_S = 3.0

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.is_shown = False

    def __call__(self, text: str) -> None:
        """Say what comes next."""
        elapsed = time.monotonic() - self.start
        if elapsed < self.QUIET_S:
            return
        self.is_shown = True
        line = f"{elapsed:3.0f} s: {text}"
        if sys.stderr.isatty():
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self.is_shown and sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    summary = "rank the configurations (mesh, micro-batch size, activation checkpointing) that fit in memory by throughput"
    command = add_command(commands, "tune", summary, _run, EXAMPLES)
    command.add_argument("--gpus", type=int, required=True, metavar="N", help="number of devices, all of which are used")
    command.add_argument(
        "--global-batch", type=int, required=True, metavar="N", help="samples per optimizer step, over all devices"
    )
    options.add(command, "--seq")
    command.add_argument(
        "--top", type=int, default=20, metavar="N", help="configurations to show, fastest first (default: %(default)s)"
    )
    text = f"one or more of {', '.join(PRECISIONS)}, separated by commas (default: %(default)s)"
    options.add(command, "--precision", metavar="NAMES", help=text)
    options.add(command, "--optimizer", "--compile", "--hardware", "--plan", "--json")
    text = "write the configurations with their memory, and those that were rejected, as one self-contained HTML file"
    options.add(command, "--html", help=text)


def _run(args: argparse.Namespace) -> int:
    target = load(args.target)
    with Progress() as progress:
        found = tune(
            target.model,
            target.inputs,
            args.gpus,
            args.global_batch,
            hardware_=args.hardware,
            precisions=args.precision.split(","),
            optimizer=args.optimizer,
            plan=args.plan or target.plan,
            loss_fn=target.loss_fn,
            seq=args.seq,
            compile=args.compile,
            most=args.top,
            progress=progress,
        )
    print(found.to_json() if args.json else found)
    if args.html is not None:
        found.html(args.html, command=args.command)
        print(f"Wrote {args.html}", file=sys.stderr if args.json else sys.stdout)
    return 0
