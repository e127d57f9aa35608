"""The one printer of tables: plans, shards, checkpoints, estimates, comparisons.

rich lays them out. It is an optional dependency, and a plan is printed in every run, so without rich the cells are padded here.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Collection, Sequence
from importlib.util import find_spec

Rows = Sequence[Sequence[str]]


def table(header: Sequence[str], rows: Rows, *, right: Collection[int] = (), indent: int = 2) -> str:
    """Format rows of cells as plain text, one line per row, with two spaces between columns.

    Args:
        header: The first line.
        rows: One cell for each column of `header`.
        right: The indices of columns that are aligned to the right, such as numbers.
        indent: Spaces in front of each line.

    Example:
        >>> print(table(["name", "bytes"], [["q", "1,024"]], right={1}))
          name  bytes
          q     1,024
    """
    try:
        text = _by_rich(header, rows, right)
    except ImportError:
        text = _padded([header, *rows], right)
    return "\n".join((" " * indent + line).rstrip() for line in text.splitlines())


def _by_rich(header: Sequence[str], rows: Rows, right: Collection[int]) -> str:
    from rich.console import Console
    from rich.table import Table

    layout = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, name in enumerate(header):
        layout.add_column(name, justify="right" if i in right else "left", no_wrap=True)
    for row in rows:
        layout.add_row(*row)
    # as wide as it takes, and without color: the text goes into files and logs as well
    console = Console(file=io.StringIO(), width=100_000, color_system=None, highlight=False, markup=False, emoji=False)
    console.print(layout)
    return console.file.getvalue()  # type: ignore[attr-defined]


def _padded(rows: Rows, right: Collection[int]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))] for row in rows]
    return "\n".join("  ".join(row) for row in cells)


def has_rich_terminal() -> bool:
    """Return whether stdout is a terminal and rich is installed, so that frames and colors can be shown."""
    return sys.stdout.isatty() and find_spec("rich") is not None


def print_colored(text: str, style: str) -> None:
    """Print text in a style of rich, such as "dim" or "bold red"; needs rich."""
    from rich.console import Console
    from rich.text import Text

    Console().print(Text(text, style))


def print_framed(
    title: str,
    header: Sequence[str],
    rows: Rows,
    *,
    right: Collection[int] = (),
    style: Callable[[int, str], str] = lambda column, cell: "",
) -> None:
    """Print a table as `table` does, but with a title, a frame and colors, wrapped to the width of the terminal; needs rich.

    `style` returns the style of a cell from its column index and its text.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    layout = Table(title=Text(title), title_justify="left", header_style="bold")
    for i, name in enumerate(header):
        layout.add_column(Text(name), justify="right" if i in right else "left")
    for row in rows:
        layout.add_row(*(Text(cell, style(i, cell)) for i, cell in enumerate(row)))
    Console().print(layout)
