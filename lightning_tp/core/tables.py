"""The one printer of tables as text: plans, shards, checkpoints, estimates.

rich lays them out. It is an optional dependency, and a plan is printed at every run: without it cells are padded here.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[int] = (), indent: int = 2) -> str:
    """Format rows of cells as text, one line per row, columns two spaces apart.

    Args:
        header: the first line.
        rows: one cell for each column of `header`.
        right: the columns that are aligned to the right: numbers.
        indent: spaces in front of each line.

    Example:
        >>> print(table(["name", "bytes"], [["q", "1,024"]], right={1}))
          name  bytes
          q     1,024
    """
    try:
        text = _by_rich(header, rows, right)
    except ImportError:
        text = _padded([header, *rows], right)
    return "\n".join(" " * indent + line.rstrip() for line in text.splitlines())


def _by_rich(header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int]) -> str:
    from rich.console import Console
    from rich.table import Table

    lines = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, name in enumerate(header):
        lines.add_column(name, justify="right" if i in right else "left", no_wrap=True)
    for row in rows:
        lines.add_row(*row)
    # as wide as it takes, and without color: the text goes into files and logs as well
    console = Console(file=io.StringIO(), width=100_000, color_system=None, highlight=False, markup=False, emoji=False)
    console.print(lines)
    return console.file.getvalue()  # type: ignore[attr-defined]


def _padded(rows: Sequence[Sequence[str]], right: Collection[int]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))] for row in rows]
    return "\n".join("  ".join(row) for row in cells)
