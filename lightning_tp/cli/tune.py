"""The command `lightning-tp tune`: which mesh, micro-batch size and activation checkpointing are the fastest that fit."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from lightning_tp.cli.options import (
    add_hardware_and_compile,
    add_optimizer,
    add_pictures,
    add_plan,
    add_precision,
    check_counts,
    check_names,
    check_pictures,
    read_plan,
)
from lightning_tp.cli.parser import add_command
from lightning_tp.cli.progress import Progress
from lightning_tp.cli.targets.load import load
from lightning_tp.estimate.cost.hardware import hardware
from lightning_tp.estimate.tune import tune

EXAMPLES = """\
  lightning-tp tune llama-3-8b/config.json --gpus 64 --hardware h100 --global-batch 512 --seq 8192
                                                                    which mesh, micro-batch size and checkpointing
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    summary = "rank the configurations (mesh, micro-batch size, activation checkpointing) that fit in memory by throughput"
    command = add_command(commands, "tune", summary, _run, EXAMPLES)
    command.add_argument("--gpus", type=int, required=True, metavar="N", help="number of devices, all of which are used")
    command.add_argument(
        "--global-batch", type=int, required=True, metavar="N", help="samples per optimizer step, over all devices"
    )
    command.add_argument("--seq", type=int, metavar="N", help="sequence length (default: that of the inputs)")
    command.add_argument(
        "--top", type=int, default=20, metavar="N", help="configurations to show, fastest first (default: %(default)s)"
    )
    add_precision(command, several=True)
    add_optimizer(command)
    add_hardware_and_compile(command)
    add_plan(command, "as TPStrategy chooses")
    command.add_argument("--json", action="store_true", help="print JSON, with nothing else on stdout")
    add_pictures(command, "", "the configurations with their memory, and those that were rejected")


def _run(args: argparse.Namespace) -> int:
    check_pictures(args)
    check_counts(args, "gpus", "global_batch", "seq", "top")
    hardware(args.hardware)  # an error in it comes before the model is built
    check_names(args.precision, args.optimizer)
    args.plan = read_plan(args.plan)
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
