"""Options, help texts and progress that several commands share."""

from __future__ import annotations

import argparse
import sys
import time
from difflib import get_close_matches
from typing import Any

from lightning_tp.errors import TPError
from lightning_tp.estimate.cost.hardware import known_hardware
from lightning_tp.estimate.drawn.figure import check_plot
from lightning_tp.estimate.drawn.pages import check_page
from lightning_tp.estimate.rank.optimizer import KNOWN
from lightning_tp.estimate.rank.settings import PRECISIONS

CHECKPOINTING = ("none", "block", "selective")


CHECKPOINTING_HELP = "what is run again in the backward: nothing, each block, or of each block what is cheap (default: %(default)s)"


def add_hardware(command: Any) -> None:
    """The option `--hardware`."""
    known = ", ".join(known_hardware())
    text = f"{known}, or file.json or file.json:name with your own (default: %(default)s)"
    command.add_argument("--hardware", default="h100", metavar="NAME", help=text)


def add_pictures(command: Any, plots: str, page: str) -> None:
    """The options `--plot` (where there are plots) and `--html`."""
    if plots:
        text = f"write {plots} as .svg, .png or .pdf, by the file name extension"
        command.add_argument("--plot", metavar="FILE", help=text)
    command.add_argument("--html", metavar="FILE", help=f"write {page}, as one HTML file that needs nothing else")


def check_pictures(args: argparse.Namespace) -> None:
    """Refuse files that could not be written, before the work begins.

    Raises:
        TPError: as `check_plot` and `check_page`.
    """
    if getattr(args, "plot", None) is not None:
        check_plot(args.plot, "--plot")
    if args.html is not None:
        check_page(args.html, "--html", figures=hasattr(args, "plot"))


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
