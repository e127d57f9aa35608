"""The command `lightning-tp estimate`: memory, communication and time of a training step on one rank of any mesh."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from lightning_tp.cli import options
from lightning_tp.cli.parser import add_command
from lightning_tp.cli.targets.load import load
from lightning_tp.core.tables import has_rich_terminal, print_colored, print_framed
from lightning_tp.estimate import Estimate, estimate

EXAMPLES = """\
  lightning-tp estimate llama-2-70b/config.json --tp 8 --dp 256 --seq 4096 --batch 1 --hardware h100
                                                                    memory, communication and time of a step on one rank
  lightning-tp estimate "train.py --size large" --tp 8 --dp 16      for the module that a script trains, with its batch
  lightning-tp estimate llama-2-70b/config.json --tp 8 --dp 256 --html report.html --plot memory.png
                                                                    as a page, and as plots
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    summary = "estimate memory, communication and time of a training step on one rank of any mesh; needs no devices"
    command = add_command(commands, "estimate", summary, _run, EXAMPLES)
    options.add(command, "--tp", "--dp", "--seq")
    text = "micro-batch size per data-parallel rank (default: that of the inputs)"
    command.add_argument("--batch", type=int, metavar="N", help=text)
    text = "micro-batches per optimizer step (default: %(default)s)"
    command.add_argument("--accumulate", type=int, default=1, metavar="N", help=text)
    options.add(command, "--precision", "--optimizer", "--activation-checkpointing", "--no-sequence-parallel")
    text = "all-gather the logits instead of computing the loss from vocabulary shards"
    command.add_argument("--no-loss-parallel", action="store_true", help=text)
    options.add(command, "--compile", "--hardware", "--plan", "--json")
    options.add(command, "--plot", help=f"write plots of memory, collectives and time; {options.FORMATS}")
    text = "write a report (all numbers, plots, the plan as a picture, assumptions), as one self-contained HTML file"
    options.add(command, "--html", help=text)


def _run(args: argparse.Namespace) -> int:
    target = load(args.target)
    found = estimate(
        target.model,
        target.inputs,
        (args.dp, args.tp),
        precision=args.precision,
        optimizer=args.optimizer,
        activation_checkpointing=options.activation_checkpointing(args),
        sequence_parallel=not args.no_sequence_parallel,
        loss_parallel=not args.no_loss_parallel,
        plan=args.plan or target.plan,
        hardware=args.hardware,
        loss_fn=target.loss_fn,
        batch=args.batch or target.batch,
        seq=args.seq,
        accumulate=args.accumulate,
        compile=args.compile,
    )
    if args.json:
        print(found.to_json())
    else:
        show(found)
    if args.plot is not None:
        found.plot(args.plot)
        _say_written(args.plot, args)
    if args.html is not None:
        found.html(args.html, command=args.command)
        _say_written(args.html, args)
    return 0


def _say_written(file: str, args: argparse.Namespace) -> None:
    print(f"Wrote {file}", file=sys.stderr if args.json else sys.stdout)


def show(found: Estimate) -> None:
    """Print the tables of an estimate; with frames and colors on a terminal."""
    if not has_rich_terminal():
        print(found)
        return
    print_colored(found.headline, "green" if found.fits else "red")
    print_colored(found.plan, "dim")
    for table in found.tables():
        print_framed(table.caption, table.header, table.rows, right=table.right)
    print_colored("Assumed:\n" + "\n".join(f"  - {a}" for a in found.assumptions), "dim")
