"""Draw the picture of a plan: boxes from top to bottom, and on the left the state of the activations at each height.

A square in each box shows a rank's shard of the weight. Everything is placed here, since matplotlib lays out charts, not boxes in boxes: positions
are pixels from the top left corner, 100 to an inch, and the figure is as high as what was drawn.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tp.core.units import size
from lightning_tp.estimate.drawn.figure import CHARACTER, DIM, GRAY, STYLE, WIDE, check_plot, new_figure, save
from lightning_tp.estimate.drawn.picture import STATES, Box, Communication, Cut, Frame, Picture, Row, SideBySide, StateKind
from lightning_tp.estimate.drawn.series import BLUE, GREEN, ORANGE, PINK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE, GAP, PAD = 15.0, 9.0, 9.0
LEFT = 34.0  # of the boxes: the stripe is left of it
GLYPH = 30.0
BOLD = 1.15  # how much wider bold text is
MOST_STRIPES = 8
NARROWEST = 190.0  # a box that stands beside others
STRIPES: dict[StateKind, tuple[str, Any]] = {  # color and dashes
    "replicated": (GRAY, "-"),
    "sequence": (BLUE[0], (0, (0.8, 0.5))),
    "features": (GREEN[0], (0, (2.5, 0.4))),
    "partial": (PINK, (0, (0.3, 0.4))),
    "sharded": (GREEN[2], (0, (2.5, 0.4))),
    "unknown": (GRAY, (0, (0.1, 1))),
}
CUTS: dict[Cut, tuple[str, str]] = {  # color and words
    "columns": (GREEN[0], "column-wise"),
    "rows": (ORANGE[0], "row-wise"),
    "sequence": (BLUE[0], "replicated weight, sequence-sharded input"),
    "replicated": (GRAY, "replicated"),
    "": (GRAY, "collective"),
}
SENT = "#e8a33d"


def plot_plan(picture: Picture, path: str | Path) -> None:
    """Write the picture of a plan as .svg, .png or .pdf; `TPError` as `check_plot`, or if the file can't be written."""
    check_plot(path)
    save(draw_picture(picture), path, picture.title)


def draw_picture(picture: Picture, width: float = WIDE) -> Figure:
    """Draw a picture, this many inches wide."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = new_figure((width, 1.0), layout=None)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.axis("off")
        pen = _Pen(axes, picture.tp)
        right = 100 * width - 8
        y = pen.write(8, 8, right, picture.title, weight="bold", size=9.5)
        y = pen.write(8, y, right, f"Plan: {picture.source}; {picture.order}", **DIM)
        y = pen.legend(8, y + 6, right)
        pen.changes.append((y + 10, "unknown"))
        y = pen.rows(picture.rows, LEFT, y + 10, right)
        for (top, state), (bottom, _) in pairwise([*pen.changes, (y + 10, "unknown")]):
            pen.line(state, 10, top, bottom)
        if picture.left_out:
            names = ", ".join(f"{n} {name}" for name, n in sorted(picture.left_out.items(), key=lambda x: -x[1]))
            y = pen.write(LEFT, y + 14, right, f"Not shown (no parameters): {names}", **DIM)
        axes.set(xlim=(0, 100 * width), ylim=(y + 10, 0))
        figure.set_size_inches(width, (y + 10) / 100)
        for artist in axes.get_children():
            artist.set_clip_on(False)
    return figure


class _Pen:
    """Draws from top to bottom; most methods return where they end."""

    def __init__(self, axes: Axes, tp: int) -> None:
        self.axes, self.tp = axes, tp
        self.changes: list[tuple[float, StateKind]] = []  # from which height on the activations are in which state

    def rows(self, rows: Sequence[Row], left: float, y: float, right: float, depth: int = 1) -> float:
        """Draw rows below each other."""
        for row in rows:
            if isinstance(row, Frame):
                y = self.frame(row, left, y, right, depth)
            elif isinstance(row, Communication):
                y = self.communication(row, left, y, right)
            elif isinstance(row, SideBySide) and right - left < NARROWEST * len(row.boxes):
                y = self.rows(row.boxes, left, y, right, depth) - GAP
            else:
                y = self.boxes(row.boxes if isinstance(row, SideBySide) else [row], left, y, right)
            y += GAP
        return y - GAP

    def frame(self, frame: Frame, left: float, top: float, right: float, depth: int) -> float:
        """Draw a module around those in it; several that are alike as a stack of paper."""
        y = self.write(left + PAD, top + 6, right - PAD, _title(frame), weight="bold") + 4
        y = self.rows(frame.rows, left + PAD, y, right - PAD, depth + 1) + PAD
        self.rectangle(left, top, right, y, GRAY, 0.08, zorder=depth)
        if frame.times > 1:
            self.axes.plot([left + 6, right + 5, right + 5], [y + 5, y + 5, top + 6], color=GRAY, linewidth=1)
            y += 5
        return y

    def communication(self, row: Communication, left: float, top: float, right: float) -> float:
        """Draw a collective; from its middle on, the activations are what it makes of them."""
        more = ", ".join(part for part in (row.reason, size(row.bytes) if row.bytes else "") if part)
        y = self.write(left + PAD, top + 4, right - PAD, row.words, weight="bold")
        if len(row.words) * BOLD + len(more) + 2 < _characters(right - left - 2 * PAD):
            self.axes.text(right - PAD, y - 0.25 * LINE, more, ha="right", zorder=20, **DIM)
        else:
            y = self.write(left + PAD, y, right - PAD, more, **DIM)
        self.rectangle(left, top, right, y + 4, SENT, 0.22)
        now = self.changes[-1][1]
        if row.forward == "all-gather" or (now, row.forward) == ("partial", "all-reduce"):
            self.changes.append(((top + y + 4) / 2, "replicated"))
        elif (now, row.forward) == ("partial", "reduce-scatter"):
            self.changes.append(((top + y + 4) / 2, "sequence"))
        return y + 4

    def boxes(self, boxes: Sequence[Box], left: float, top: float, right: float) -> float:
        """Draw boxes beside each other; the activations are first what arrives there, then what leaves."""
        width = (right - left - GAP * (len(boxes) - 1)) / len(boxes)
        lefts = [left + i * (width + GAP) for i in range(len(boxes))]
        bottom = 4 + max(self.text_of(box, x + PAD, top + 6, x + width - PAD) for box, x in zip(boxes, lefts))
        for box, x in zip(boxes, lefts):
            self.rectangle(x, top, x + width, bottom, CUTS[box.cut][0], 0.0, linestyle="-" if box.class_name else "--")
        states = ((top, boxes[-1].arrives.kind), ((top + bottom) / 2, boxes[-1].leaves.kind))
        self.changes += [(y, kind) for y, kind in states if kind not in ("unknown", self.changes[-1][1])]
        return bottom

    def text_of(self, box: Box, left: float, top: float, right: float) -> float:
        """Write what a box says."""
        if not box.class_name:
            return self.write(left, top, right, f"{_title(box)}: {box.style}", **DIM)
        y = top
        if box.cut:
            self.glyph(box.cut, left, top + 3, top + 3 + GLYPH)
            left += GLYPH + 10
        y = self.write(left, y, right, _title(box), weight="bold")
        y = self.write(left, y, right, box.style)
        for line in _lines(box):
            y = self.write(left, y, right, line, **DIM)
        return max(y, top + GLYPH + 6) if box.cut else y

    # ------------------------------------------------------------------------------------------------------------- parts

    def write(self, left: float, top: float, right: float, text: str, **style: Any) -> float:
        """Write lines that are no longer than there is room."""
        room = (right - left) / (BOLD if "weight" in style else 1) * 8 / style.get("size", 8)
        lines = textwrap.wrap(text, _characters(room), break_on_hyphens=False)
        for i, line in enumerate(lines):
            self.axes.text(left, top + LINE * (i + 0.75), line, zorder=20, **style)
        return top + LINE * len(lines)

    def line(self, state: StateKind, left: float, top: float, bottom: float) -> None:
        """Draw a line as activations in this state have it."""
        color, dashes = STRIPES[state]
        self.axes.vlines(left + 6, top, bottom, color=color, linewidth=4.5, linestyle=dashes)

    def rectangle(self, left: float, top: float, right: float, bottom: float, color: str, alpha: float, **style: Any) -> None:
        """Draw a rectangle with round corners."""
        from matplotlib.patches import FancyBboxPatch

        corners = f"round,pad=0,rounding_size={min(6, (bottom - top) / 2)}"
        paint = {"facecolor": (color, alpha), "edgecolor": color, "zorder": 9, **style}
        self.axes.add_patch(FancyBboxPatch((left, top), right - left, bottom - top, corners, **paint))

    def glyph(self, cut: Cut, x: float, top: float, bottom: float) -> None:
        """Draw a square that is cut as a weight is, with one rank's shard filled; or a piece of the bar of a collective."""
        from matplotlib.patches import Rectangle

        if not cut:
            return self.rectangle(x, top, x + bottom - top, bottom, SENT, 0.22)
        n = max(1, min(self.tp, MOST_STRIPES)) if cut in ("columns", "rows") else 1
        side, color = bottom - top, CUTS[cut][0]
        for i in range(n):
            at, shape = (
                ((x + i * side / n, top), (side / n, side)) if cut == "columns" else ((x, top + i * side / n), (side, side / n))
            )
            self.axes.add_patch(Rectangle(at, *shape, facecolor="none" if i else color, edgecolor=color, zorder=20, linewidth=0.8))

    def legend(self, left: float, top: float, right: float) -> float:
        """Say what the stripes mean, and the squares and bars."""
        y = top
        states = [(words, partial(self.line, kind)) for kind, words in STATES.items() if kind != "sharded"]
        cuts = [(words, partial(self.glyph, cut)) for cut, (_, words) in CUTS.items()]
        for samples in (states, cuts):
            x = left
            for words, draw in samples:
                width = 34 + 100 * CHARACTER * len(words)
                if x > left and x + width > right:
                    x, y = left, y + LINE + 3
                draw(x, y + 1, y + 14)
                self.write(x + 20, y, right, words)
                x += width
            y += LINE + 4
        return y


def _title(row: Box | Frame) -> str:
    many = f" x {row.times}" if row.times > 1 else ""
    return f"{row.name}{many}: {row.class_name}" if row.class_name else f"{row.name}{many}"


def _lines(box: Box) -> list[str]:
    """List what a box says below its style: shapes of its matrices, activations, notes, and why a matrix is replicated."""
    matrices = [w for w in box.weights if len(w.full) > 1]
    shown = matrices or box.weights[:1]
    lines = [w.words if len(shown) == 1 else f"{w.name} {w.words}" for w in shown]
    lines = lines if len(lines) <= 4 else ["; ".join(lines)]
    arrives, leaves = box.arrives.words, box.leaves.words
    states = [("input and output", arrives)] if arrives == leaves else [("input", arrives), ("output", leaves)]
    lines += [f"{name} {words}" for name, words in states if words]
    return [*lines, *box.notes, *([f"because {box.reason}"] if matrices and box.reason and box.cut == "replicated" else [])]


def _characters(width: float) -> int:
    return max(8, int(width / (100 * CHARACTER)))
