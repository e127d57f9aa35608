"""The options that several commands share, and the checks of their values before any work begins."""

from __future__ import annotations

import argparse
from difflib import get_close_matches
from typing import Any, Literal

from lightning_tp.errors import TPError
from lightning_tp.estimate.cost.hardware import hardware, known_hardware
from lightning_tp.estimate.drawn.figure import check_plot
from lightning_tp.estimate.drawn.pages import check_page
from lightning_tp.estimate.rank.optimizer import KNOWN
from lightning_tp.estimate.rank.settings import PRECISIONS
from lightning_tp.plan.plan import Plan

NUMBER: dict[str, Any] = {"type": int, "metavar": "N"}
SWITCH: dict[str, Any] = {"action": "store_true"}
FILE: dict[str, Any] = {"metavar": "FILE"}
FORMATS = ".svg, .png or .pdf, by the file name extension; needs matplotlib"
OPTIONS: dict[str, dict[str, Any]] = {
    "--tp": NUMBER | {"default": 2, "help": "tensor-parallel size (default: %(default)s)"},
    "--dp": NUMBER | {"default": 1, "help": "data-parallel size (FSDP2) (default: %(default)s)"},
    "--seq": NUMBER | {"help": "sequence length (default: that of the inputs)"},
    "--plan": FILE | {"help": "a plan as JSON (default: as TPStrategy chooses)"},
    "--no-sequence-parallel": SWITCH
    | {"help": "keep activations between the sharded modules replicated instead of sharded along the sequence dimension"},
    "--precision": {"default": "bf16-mixed", "metavar": "NAME", "help": f"{', '.join(PRECISIONS)} (default: %(default)s)"},
    "--optimizer": {"default": "adamw", "metavar": "NAME", "help": f"{', '.join(KNOWN)} (default: %(default)s)"},
    "--activation-checkpointing": {
        "choices": ("none", "block", "selective"),
        "default": "none",
        "help": "what the backward pass recomputes: nothing, each block, or the cheap part of each block (default: %(default)s)",
    },
    "--compile": SWITCH | {"help": "as TPStrategy(compile=True): fuse the kernels between matmuls"},
    "--hardware": {
        "default": "h100",
        "metavar": "NAME",
        "help": f"{', '.join(known_hardware())}, or file.json or file.json:name for your own (default: %(default)s)",
    },
    "--json": SWITCH | {"help": "print JSON, with nothing else on stdout"},
    "--plot": FILE | {"help": f"write plots; {FORMATS}"},
    "--html": FILE | {"help": "write a report, as one self-contained HTML file"},
}


def add(command: Any, *names: str, **changes: Any) -> None:
    """Add options of `OPTIONS` to a command; `changes` is what is different in this command, such as `help`."""
    for name in names:
        command.add_argument(name, **OPTIONS[name] | changes)


def activation_checkpointing(args: argparse.Namespace) -> Literal["block", "selective"] | None:
    """Return the value of `--activation-checkpointing` as TPStrategy takes it."""
    value: Literal["none", "block", "selective"] = args.activation_checkpointing
    return None if value == "none" else value


def check(args: argparse.Namespace) -> None:
    """Refuse values of options before any work begins, and replace the file of `--plan` by the plan in it."""
    given = vars(args)
    for name, value in given.items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise TPError(f"`--{name.replace('_', '-')} {value}`: pass a number, 1 or more.")
    if given.get("plot") is not None:
        check_plot(args.plot, "--plot")
    if given.get("html") is not None:
        check_page(args.html, "--html", figures="plot" in given)
    if "hardware" in given:
        hardware(args.hardware)
    for value in given.get("precision", "32-true").split(","):
        _check_name("precision", value, list(PRECISIONS))
    _check_name("optimizer", given.get("optimizer", "sgd").lower(), list(KNOWN))
    if given.get("plan") is not None:
        args.plan = _read_plan(args.plan)


def _check_name(option: str, name: str, known: list[str]) -> None:
    if name not in known:
        near = get_close_matches(name, known, 2) or [k for k in known if name and k.startswith(name)]
        meant = f", did you mean {' or '.join(near)}?" if near else "."
        raise TPError(f"`--{option} {name}`: unknown {option}{meant} Valid values: {', '.join(known)}.")


def _read_plan(path: str) -> Plan:
    try:
        return Plan.of(path)
    except TPError as error:
        raise TPError(f"`--plan {path}`: {str(error).removeprefix(f'`plan={path!r}`: ')}") from None
