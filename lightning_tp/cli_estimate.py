"""The commands `lightning-tp estimate` and `lightning-tp tune`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from lightning_tp.cli_parser import TARGET, checked_plan_file, examples
from lightning_tp.errors import TPError
from lightning_tp.estimate.draw import check_page, check_picture
from lightning_tp.estimate.hardware import hardware, known_hardware
from lightning_tp.estimate.html import write_plan
from lightning_tp.estimate.optimizer import KNOWN
from lightning_tp.estimate.plots import picture_of, plot_plan
from lightning_tp.estimate.predict import check_size, estimate
from lightning_tp.estimate.report import Estimate
from lightning_tp.estimate.tune import tune
from lightning_tp.estimate.world import PRECISIONS
from lightning_tp.plan import Plan

CHECKPOINTING = ("none", "block", "selective")
CHECKPOINTING_HELP = "what is run again in the backward: nothing, each block, or of each block what is cheap (default: %(default)s)"


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


def add_hardware(command: Any) -> None:
    """The option `--hardware`."""
    known = ", ".join(known_hardware())
    text = f"{known}, or file.json or file.json:name with your own (default: %(default)s)"
    command.add_argument("--hardware", default="h100", metavar="NAME", help=text)


def add_pictures(command: Any, plots: str, page: str) -> None:
    """The options `--plot` (where there are plots) and `--html`."""
    if plots:
        text = f"write {plots}; the ending is the format: .svg, or .png and .pdf (with matplotlib)"
        command.add_argument("--plot", metavar="FILE", help=text)
    command.add_argument("--html", metavar="FILE", help=f"write {page}, as one HTML file that needs nothing else")


def check_pictures(args: argparse.Namespace) -> None:
    """Refuse files that could not be written, before the work begins.

    Raises:
        TPError: as `check_picture` and `check_page`.
    """
    if getattr(args, "plot", None) is not None:
        check_picture(args.plot, "--plot")
    if args.html is not None:
        check_page(args.html, "--html")


def draw_plan(plan: Plan, target: Any, args: argparse.Namespace, held: Sequence[str]) -> list[str]:
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
    from lightning_tp.cli import load

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


def check_names(precisions: str, optimizer: str) -> None:
    """Refuse precisions (with commas) and an optimizer that are not known, with the nearest.

    Raises:
        TPError: it lists those that there are.
    """
    for option, names, known in (
        ("precision", precisions.split(","), list(PRECISIONS)),
        ("optimizer", [optimizer.lower()], list(KNOWN)),
    ):
        for name in names:
            if name not in known:
                near = get_close_matches(name, known, 2) or [k for k in known if name and k.startswith(name)]
                meant = f"did you mean {' or '.join(near)}? There" if near else "there"
                raise TPError(f"`--{option} {name}`: {meant} are {', '.join(known)}.")


def _wrote(where: str, args: argparse.Namespace) -> None:
    print(f"Wrote {where}", file=sys.stderr if args.json else sys.stdout)


def _tune(args: argparse.Namespace) -> int:
    from lightning_tp.cli import load

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


class Progress:
    """Says on stderr what is looked at, once it has taken a few seconds; on a terminal in one line, which goes at the end."""

    QUIET_S = 3.0

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.shown = False

    def __call__(self, text: str) -> None:
        """What comes now."""
        if time.monotonic() - self.start < self.QUIET_S:
            return
        self.shown = True
        line = f"{time.monotonic() - self.start:3.0f} s: {text}"
        if sys.stderr.isatty():
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self.shown and sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


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
