"""The options that several commands share, and the checks of their values before any work begins."""

from __future__ import annotations

import argparse
from difflib import get_close_matches
from typing import Any, Literal

from lightning_tp.core.files import check_file
from lightning_tp.errors import TPError
from lightning_tp.estimate.cost.hardware import known_hardware
from lightning_tp.estimate.drawn.drawing import check_page, check_picture
from lightning_tp.estimate.trace.optimizer import KNOWN
from lightning_tp.estimate.trace.rank import PRECISIONS
from lightning_tp.plan.plan import Plan


def add_mesh(command: Any) -> None:
    """Add `--tp` and `--dp`."""
    command.add_argument("--tp", type=int, default=2, metavar="N", help="tensor-parallel size (default: %(default)s)")
    command.add_argument("--dp", type=int, default=1, metavar="N", help="data-parallel size (FSDP2) (default: %(default)s)")


def add_plan(command: Any, default: str) -> None:
    """Add `--plan`; `default` says which plan is used without it."""
    command.add_argument("--plan", metavar="FILE", help=f"a plan as JSON (default: {default})")


def add_no_sequence_parallel(command: Any) -> None:
    """Add `--no-sequence-parallel`."""
    text = "keep activations between the sharded modules replicated instead of sharded along the sequence dimension"
    command.add_argument("--no-sequence-parallel", action="store_true", help=text)


def add_hardware_and_compile(command: Any) -> None:
    """Add `--hardware` and `--compile`, on which predicted times depend."""
    known = ", ".join(known_hardware())
    text = f"{known}, or file.json or file.json:name for your own (default: %(default)s)"
    command.add_argument("--hardware", default="h100", metavar="NAME", help=text)
    command.add_argument("--compile", action="store_true", help="as TPStrategy(compile=True): fuse the kernels between matmuls")


def add_precision(command: Any, *, several: bool = False) -> None:
    """Add `--precision`: one, or `several` separated by commas."""
    known = ", ".join(PRECISIONS)
    text = f"one or more of {known}, separated by commas" if several else known
    metavar = "NAMES" if several else "NAME"
    command.add_argument("--precision", default="bf16-mixed", metavar=metavar, help=f"{text} (default: %(default)s)")


def add_optimizer(command: Any) -> None:
    """Add `--optimizer`."""
    command.add_argument("--optimizer", default="adamw", metavar="NAME", help=f"{', '.join(KNOWN)} (default: %(default)s)")


def add_activation_checkpointing(command: Any) -> None:
    """Add `--activation-checkpointing`; read it by `activation_checkpointing`."""
    command.add_argument(
        "--activation-checkpointing",
        choices=("none", "block", "selective"),
        default="none",
        help="what the backward pass recomputes: nothing, each block, or the cheap part of each block (default: %(default)s)",
    )


def activation_checkpointing(args: argparse.Namespace) -> Literal["block", "selective"] | None:
    """Return the value of `--activation-checkpointing` as TPStrategy takes it."""
    value: Literal["none", "block", "selective"] = args.activation_checkpointing
    return None if value == "none" else value


def add_pictures(command: Any, plots: str, page: str) -> None:
    """Add `--plot` (if there are plots) and `--html`, with what they write."""
    if plots:
        text = f"write {plots}; the suffix is the format: .svg, or .png and .pdf (with matplotlib)"
        command.add_argument("--plot", metavar="FILE", help=text)
    command.add_argument("--html", metavar="FILE", help=f"write {page}, as one self-contained HTML file")


def check_pictures(args: argparse.Namespace) -> None:
    """Refuse files of `--plot` and `--html` that could not be written.

    Raises:
        TPError: As `check_picture` and `check_page`.
    """
    if getattr(args, "plot", None) is not None:
        check_picture(args.plot, "--plot")
    if args.html is not None:
        check_page(args.html, "--html")


def check_output(path: str | None, option: str) -> None:
    """Refuse a file that could not be written; "-" is stdout.

    Raises:
        TPError: As `check_file`.
    """
    if path is not None and path != "-":
        check_file(path, option)


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """Refuse numbers below 1.

    Args:
        args: The parsed command line.
        names: Of its attributes, each a whole number or None.

    Raises:
        TPError: With the option and its value.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise TPError(f"`--{name.replace('_', '-')} {value}`: pass a number, 1 or more.")


def check_names(precisions: str, optimizer: str) -> None:
    """Refuse unknown precisions (separated by commas) and optimizers.

    Raises:
        TPError: With the nearest names, and all valid ones.
    """
    for option, names, known in (
        ("precision", precisions.split(","), list(PRECISIONS)),
        ("optimizer", [optimizer.lower()], list(KNOWN)),
    ):
        for name in names:
            if name not in known:
                near = get_close_matches(name, known, 2) or [k for k in known if name and k.startswith(name)]
                meant = f", did you mean {' or '.join(near)}?" if near else "."
                raise TPError(f"`--{option} {name}`: unknown {option}{meant} Valid values: {', '.join(known)}.")


def read_plan(path: str | None) -> Plan | None:
    """Read the file of `--plan`.

    Raises:
        TPError: If there is no plan in that file.
    """
    if path is None:
        return None
    try:
        return Plan.of(path)
    except TPError as error:
        raise TPError(f"`--plan {path}`: {str(error).removeprefix(f'`plan={path!r}`: ')}") from None
