"""The commands `lightning-tp estimate` and `lightning-tp tune`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from lightning_tp.cli.options import (
    CHECKPOINTING,
    CHECKPOINTING_HELP,
    Progress,
    add_hardware,
    add_pictures,
    check_names,
    check_pictures,
)
from lightning_tp.cli.parser import TARGET, checked_plan_file, examples
from lightning_tp.estimate.cost.hardware import hardware
from lightning_tp.estimate.drawn.pages import write_plan
from lightning_tp.estimate.drawn.picture_from_trace import picture_of
from lightning_tp.estimate.drawn.picture_render import plot_plan
from lightning_tp.estimate.predict import Estimate, estimate
from lightning_tp.estimate.rank.inputs import check_size
from lightning_tp.estimate.rank.optimizer import KNOWN
from lightning_tp.estimate.rank.settings import PRECISIONS
from lightning_tp.estimate.tune import tune
from lightning_tp.plan.checked import CheckedPlan


def add_commands(commands: Any) -> None:
    """Put them into the parser."""
    texts = {
        "estimate": "memory, communication and time of a training step on one rank, at any size",
        "tune": "the meshes, micro-batches and checkpointings that fit a number of devices, the fastest first",
    }
    made = {}
    for name, text in texts.items():
        command = commands.add_parser(name, help=text, description=f"{text}\n\n{TARGET}", epilog=examples(name))
        command.add_argument("target", metavar="TARGET", help="the model: see above")
        command.add_argument("--seq", type=int, metavar="N", help="length of the sequences (default: that of the inputs)")
        add_hardware(command)
        command.add_argument("--optimizer", default="adamw", metavar="NAME", help=f"{', '.join(KNOWN)} (default: %(default)s)")
        command.add_argument(
            "--compile", action="store_true", help="as `compile=True` of TPStrategy: kernels between products are one"
        )
        command.add_argument("--plan", metavar="FILE", help="the JSON of a plan (default: what TPStrategy would take)")
        command.add_argument("--json", action="store_true", help="print JSON, and nothing else on stdout")
        made[name] = command
    one, many = made["estimate"], made["tune"]
    add_pictures(one, "plots of memory, collectives and time", "a report: all numbers, plots, the plan as a picture, assumptions")
    add_pictures(many, "", "the choices with their memory, and what is refused")
    one.set_defaults(run=_estimate)
    many.set_defaults(run=_tune)
    one.add_argument("--tp", type=int, default=2, metavar="N", help="ranks that share one model (default: %(default)s)")
    one.add_argument("--dp", type=int, default=1, metavar="N", help="such groups; FSDP2 shards over them (default: %(default)s)")
    one.add_argument(
        "--batch", type=int, metavar="N", help="samples of a micro-batch on a data-parallel rank (default: those of the inputs)"
    )
    one.add_argument("--accumulate", type=int, default=1, metavar="N", help="micro-batches of a step (default: %(default)s)")
    one.add_argument("--precision", default="bf16-mixed", metavar="NAME", help=f"{', '.join(PRECISIONS)} (default: %(default)s)")
    one.add_argument("--activation-checkpointing", choices=list(CHECKPOINTING), default="none", help=CHECKPOINTING_HELP)
    one.add_argument(
        "--no-sequence-parallel", action="store_true", help="whole activations between the split modules, not shards of tokens"
    )
    one.add_argument("--no-loss-parallel", action="store_true", help="gather the logits, instead of a loss of their shards")
    many.add_argument("--gpus", type=int, required=True, metavar="N", help="devices, all of them used")
    many.add_argument("--global-batch", type=int, required=True, metavar="N", help="samples of a step, over all devices")
    many.add_argument(
        "--precision",
        default="bf16-mixed",
        metavar="NAMES",
        help=f"one or more of {', '.join(PRECISIONS)}, with commas (default: %(default)s)",
    )
    many.add_argument(
        "--most", type=int, default=20, metavar="N", help="choices that are shown, the fastest (default: %(default)s)"
    )


def draw_plan(plan: CheckedPlan, target: Any, args: argparse.Namespace, held: Sequence[str]) -> list[str]:
    """Write the picture of a plan where the options ask for it; returns the files."""
    if args.plot is None and args.html is None:
        return []
    picture = picture_of(target.model, target.inputs, plan, loss_fn=target.loss_fn)
    if args.plot is not None:
        plot_plan(picture, args.plot)
    if args.html is not None:
        write_plan(plan, picture, args.html, command=args.command, held=held)
    return [where for where in (args.plot, args.html) if where is not None]


def _estimate(args: argparse.Namespace) -> int:
    from lightning_tp.cli.target import load

    check_pictures(args)
    for name in ("tp", "dp", "batch", "seq", "accumulate"):
        check_size(name, getattr(args, name))
    hardware(args.hardware)  # before the model is built
    check_names(args.precision, args.optimizer)
    args.plan = checked_plan_file(args.plan)
    target = load(args.target)
    how = args.activation_checkpointing
    found = estimate(
        target.model,
        target.inputs,
        (args.dp, args.tp),
        precision=args.precision,
        optimizer=args.optimizer,
        activation_checkpointing=None if how == "none" else how,
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
        _wrote(args.plot, args)
    if args.html is not None:
        found.html(args.html, command=args.command)
        _wrote(args.html, args)
    return 0


def _wrote(where: str, args: argparse.Namespace) -> None:
    print(f"Wrote {where}", file=sys.stderr if args.json else sys.stdout)


def _tune(args: argparse.Namespace) -> int:
    from lightning_tp.cli.target import load

    check_pictures(args)
    for name in ("gpus", "global_batch", "seq", "most"):
        check_size(name, getattr(args, name))
    hardware(args.hardware)
    precisions = args.precision.split(",")
    check_names(args.precision, args.optimizer)
    args.plan = checked_plan_file(args.plan)
    target = load(args.target)
    with Progress() as progress:
        found = tune(
            target.model,
            target.inputs,
            args.gpus,
            args.global_batch,
            hardware_=args.hardware,
            precisions=precisions,
            optimizer=args.optimizer,
            plan=args.plan or target.plan,
            loss_fn=target.loss_fn,
            seq=args.seq,
            compile=args.compile,
            most=args.most,
            progress=progress,
        )
    print(found.to_json() if args.json else found)
    if args.html is not None:
        found.html(args.html, command=args.command)
        _wrote(args.html, args)
    return 0


def show(found: Estimate) -> None:
    """The tables of an estimate; in colour on a terminal, if rich is there."""
    try:
        if not sys.stdout.isatty():
            raise ImportError
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(found)
        return
    console = Console()
    console.print(Text(found.headline, "green" if found.fits else "red"))
    console.print(Text(found.plan, "dim"))
    for title, names, rows in found.tables():
        table = Table(title=title, title_justify="left", header_style="bold")
        for i, name in enumerate(names):
            table.add_column(name, justify="left" if i == 0 or (len(names) > 3 and i < 2) else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(Text("Assumed:\n" + "\n".join(f"  - {a}" for a in found.assumptions), "dim"))
