"""Draw the picture of a plan: boxes from top to bottom, and on the left the state of the activations at each height.

A square in each box shows a rank's shard of the weight. Everything is placed here, since matplotlib lays out charts, not boxes in boxes: positions
are pixels from the top left corner, 100 to an inch, and the figure is as high as what was drawn.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tp.core.units import size
from lightning_tp.estimate.drawn.figure import CHARACTER, DIM, GRAY, STYLE, WIDE, check_plot, new_figure, save
from lightning_tp.estimate.drawn.picture import STATES, Box, Communication, Cut, Frame, Picture, Row, State, StateKind
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
    """Write the picture of a plan as .svg, .png or .pdf.

    Raises:
        TPError: for another file name extension, without matplotlib, or if the file can't be written.
    """
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
        y = pen.rows(picture.rows, LEFT, y + 10, right)
        pen.stripe(y, y + 10)
        for top, bottom, state in pen.stripes:
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
    """Draws from top to bottom; each method returns where it ends."""

    def __init__(self, axes: Axes, tp: int) -> None:
        self.axes, self.tp = axes, tp
        self.state: StateKind = "unknown"  # of the activations at this height
        self.stripes: list[tuple[float, float, StateKind]] = []

    def rows(self, rows: Sequence[Row], left: float, top: float, right: float, depth: int = 1) -> float:
        """Draw rows below each other."""
        y = top
        for i, row in enumerate(rows):
            y = self.stripe(y, y + GAP) if i else y
            if isinstance(row, Frame):
                y = self.frame(row, left, y, right, depth)
            elif isinstance(row, Communication):
                y = self.communication(row, left, y, right)
            elif isinstance(row, Box):
                y = self.boxes([row], left, y, right)
            elif right - left >= NARROWEST * len(row.boxes):
                y = self.boxes(row.boxes, left, y, right)
            else:
                y = self.rows(row.boxes, left, y, right, depth)
        return y

    def frame(self, frame: Frame, left: float, top: float, right: float, depth: int) -> float:
        """Draw a module around those in it; several that are alike as a stack of paper."""
        y = self.write(left + PAD, top + 6, right - PAD, _title(frame), weight="bold") + 4
        self.stripe(top, y)
        y = self.rows(frame.rows, left + PAD, y, right - PAD, depth + 1)
        y = self.stripe(y, y + PAD)
        self.rectangle(left, top, right, y, GRAY, 0.08, z=depth)
        if frame.times > 1:
            self.axes.plot([left + 6, right + 5, right + 5], [y + 5, y + 5, top + 6], color=GRAY, linewidth=1)
            y = self.stripe(y, y + 5)
        return y

    def communication(self, row: Communication, left: float, top: float, right: float) -> float:
        """Draw a collective; from its middle on, the activations are what it makes of them."""
        more = ", ".join(part for part in (row.reason, size(row.bytes) if row.bytes else "") if part)
        beside = len(row.words) * BOLD + len(more) + 2 < _characters(right - left - 2 * PAD)
        y = self.write(left + PAD, top + 4, right - PAD, row.words, weight="bold")
        if beside:
            self.write(right - PAD, top + 4, right, more, ha="right", **DIM)
        elif more:
            y = self.write(left + PAD, y, right - PAD, more, **DIM)
        self.rectangle(left, top, right, y + 4, SENT, 0.22, radius=10)
        middle = self.stripe(top, (top + y + 4) / 2)
        if row.forward == "all-gather" or (self.state, row.forward) == ("partial", "all-reduce"):
            self.state = "replicated"
        elif (self.state, row.forward) == ("partial", "reduce-scatter"):
            self.state = "sequence"
        return self.stripe(middle, y + 4)

    def boxes(self, boxes: Sequence[Box], left: float, top: float, right: float) -> float:
        """Draw boxes beside each other; the activations are first what arrives there, then what leaves."""
        width = (right - left - GAP * (len(boxes) - 1)) / len(boxes)
        bottom = top
        for i, box in enumerate(boxes):
            x = left + i * (width + GAP)
            bottom = max(bottom, self.text_of(box, x + PAD, top + 6, x + width - PAD) + 4)
        for i, box in enumerate(boxes):
            x = left + i * (width + GAP)
            self.rectangle(x, top, x + width, bottom, CUTS[box.cut][0], 0.0, dashed=not box.class_name, z=9)
        middle = self.stripe(top, (top + bottom) / 2, boxes[-1].arrives)
        return self.stripe(middle, bottom, boxes[-1].leaves)

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
        for line in (*_weights(box), *_states(box), *box.notes, *_reasons(box)):
            y = self.write(left, y, right, line, **DIM)
        return max(y, top + GLYPH + 6) if box.cut else y

    # ------------------------------------------------------------------------------------------------------------- parts

    def write(self, left: float, top: float, right: float, text: str, ha: str = "left", **style: Any) -> float:
        """Write lines that are no longer than there is room."""
        room = (right - left) / (BOLD if "weight" in style else 1) * 8 / style.get("size", 8)
        lines = [text] if ha == "right" else textwrap.wrap(text, _characters(room))
        for i, line in enumerate(lines):
            self.axes.text(left, top + LINE * (i + 0.75), line, ha=ha, zorder=20, **style)
        return top + LINE * len(lines)

    def stripe(self, top: float, bottom: float, state: State | None = None) -> float:
        """Lengthen the stripe; a state that is not known leaves it as it was."""
        if state is not None and state.kind != "unknown":
            self.state = state.kind
        if self.stripes and self.stripes[-1][2] == self.state:
            top = self.stripes.pop()[0]
        self.stripes.append((top, bottom, self.state))
        return bottom

    def line(self, state: StateKind, left: float, top: float, bottom: float) -> None:
        """Draw a line as activations in this state have it."""
        color, dashes = STRIPES[state]
        self.axes.plot(
            [left + 6] * 2, [top, bottom], color=color, linewidth=4.5, linestyle=dashes, solid_capstyle="butt", dash_capstyle="butt"
        )

    def rectangle(
        self,
        left: float,
        top: float,
        right: float,
        bottom: float,
        color: str,
        alpha: float,
        *,
        radius: float = 6,
        dashed: bool = False,
        z: float = 9,
    ) -> None:
        """Draw a rectangle with round corners."""
        from matplotlib.colors import to_rgba
        from matplotlib.patches import FancyBboxPatch

        corners = f"round,pad=0,rounding_size={min(radius, (bottom - top) / 2)}"
        face, line = to_rgba(color, alpha), "--" if dashed else "-"
        patch = FancyBboxPatch(
            (left, top), right - left, bottom - top, corners, facecolor=face, edgecolor=color, linestyle=line, zorder=z
        )
        self.axes.add_patch(patch)

    def glyph(self, cut: Cut, x: float, top: float, bottom: float) -> None:
        """Draw a square that is cut as a weight is, with one rank's shard filled; or a piece of the bar of a collective."""
        from matplotlib.patches import Rectangle

        if not cut:
            return self.rectangle(x, top, x + bottom - top, bottom, SENT, 0.22, radius=4)
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


def _weights(box: Box) -> list[str]:
    """List the shapes of its matrices; biases and the like are left to the table."""
    shown = [w for w in box.weights if len(w.full) > 1] or list(box.weights[:1])
    texts = [w.words if len(shown) == 1 else f"{w.name} {w.words}" for w in shown]
    return texts if len(texts) <= 4 else ["; ".join(texts)]


def _states(box: Box) -> list[str]:
    arrives, leaves = box.arrives.words, box.leaves.words
    if arrives == leaves:
        return [f"input and output {arrives}"] if arrives else []
    return [f"{name} {words}" for name, words in (("input", arrives), ("output", leaves)) if words]


def _reasons(box: Box) -> list[str]:
    """Say why a matrix is replicated."""
    matrices = not box.weights or any(len(w.full) > 1 for w in box.weights)
    return [f"because {box.reason}"] if box.reason and matrices and box.cut == "replicated" else []


def _characters(width: float) -> int:
    return max(8, int(width / (100 * CHARACTER)))
