"""How the picture of a plan looks: boxes from top to bottom, and at the left what an activation is at each height.

The bar at the left is solid where every rank has the whole activation, dashed where each has its tokens, double where each has its features, and
dotted where each has a term of a sum that is still to be taken. A small square in each box shows a rank's share of the weight.
"""

from __future__ import annotations

from lightning_tp.core.units import size
from lightning_tp.estimate.drawn.drawing import BOLD, Drawing, fit, width_of, wrap
from lightning_tp.estimate.drawn.picture import Border, Box, Frame, Picture, Row, Side, State, StateKind

WIDE, NARROW = 880, 380  # pixels: a page, a phone
LINE, SMALL, GAP, PAD = 15.0, 11.0, 9.0, 9.0
GUTTER = 34.0
GLYPH = 30.0
MOST_STRIPES = 8
LEGEND = (
    ("whole", "every rank has all of it"),
    ("tokens", "each rank has its tokens"),
    ("features", "each rank has its features"),
    ("partial", "each rank has a term of the sum"),
)
CUTS = (("columns", "column-wise"), ("rows", "row-wise"), ("tokens", "whole, on its tokens"), ("whole", "whole"))


def draw_picture(picture: Picture, width: float = WIDE) -> Drawing:
    """The drawing, of this width in pixels."""
    tp, many = picture.tp, sum(1 for _ in picture.boxes())
    label = f"How {picture.model} is split over tp={tp}: {many} modules and operations, in the order of the forward"
    d = Drawing(width, label=label)
    y = 20.0
    d.write(8, y, fit(f"{picture.model}, tp={tp}", width - 16, 15 * BOLD), size=15, bold=True)
    for line in wrap(f"plan: {picture.source}; from top to bottom {picture.order}", width - 16, SMALL, 3):
        y += LINE
        d.write(8, y, line, size=SMALL, fill="dim")
    y = _legend(d, y + 12, width, tp)
    pen = _Pen(d, tp)
    y = pen.rows(picture.rows, GUTTER, y + 6, width - GUTTER - 6)
    pen.bar(y, y + 10, State())
    for top, bottom, kind in pen.stripes:
        _stripe(d, 16, top, bottom, kind)
    if picture.left_out:
        what = ", ".join(f"{n} {name}" for name, n in sorted(picture.left_out.items(), key=lambda x: -x[1]))
        y += 10
        for line in wrap(f"Not drawn, since they have no parameters: {what}", width - GUTTER - 6, SMALL, 3):
            y += LINE
            d.write(GUTTER, y, line, size=SMALL, fill="dim")
    d.height = y + 14
    return d


def _legend(d: Drawing, y: float, width: float, tp: int) -> float:
    x = 8.0
    for kind, words in LEGEND:
        wide = 22 + width_of(words, SMALL) + 14
        if x + wide > width and x > 8:
            x, y = 8, y + LINE + 4
        _stripe(d, x + 7, y, y + 14, kind)
        d.write(x + 20, y + 11, words, size=SMALL)
        x += wide
    x, y = 8, y + LINE + 8
    for cut, words in (*CUTS, ("sent", "collective")):
        wide = 22 + width_of(words, SMALL) + 14
        if x + wide > width and x > 8:
            x, y = 8, y + LINE + 4
        if cut == "sent":
            d.rect(x, y, 14, 14, "sent", "tp", radius=3)
        else:
            _glyph(d, x, y, 14, cut, min(tp, 4))
        d.write(x + 20, y + 11, words, size=SMALL)
        x += wide
    return y + 22


class _Pen:
    def __init__(self, drawing: Drawing, tp: int) -> None:
        self.d, self.tp = drawing, tp
        self.now: StateKind = "unknown"  # what the activation is at this height
        self.stripes: list[tuple[float, float, StateKind]] = []

    def bar(self, top: float, bottom: float, state: State) -> None:
        """The bar at the left; what is not known stays as it was."""
        if state.kind != "unknown":
            self.now = state.kind
        last = self.stripes[-1] if self.stripes else None
        if last is not None and last[2] == self.now:
            self.stripes[-1] = (last[0], bottom, self.now)
        else:
            self.stripes.append((top, bottom, self.now))

    def rows(self, rows: tuple[Row, ...], x: float, y: float, width: float) -> float:
        """Rows under each other; returns where they end."""
        for i, row in enumerate(rows):
            if i:
                self.bar(y, y + GAP, State())
                y += GAP
            if isinstance(row, Frame):
                y = self.frame(row, x, y, width)
            elif isinstance(row, Border):
                y = self.border(row, x, y, width)
            elif isinstance(row, Side) and width >= 190 * len(row.boxes):
                y = self.side(row, x, y, width)
            elif isinstance(row, Side):
                y = self.rows(row.boxes, x, y, width)
            else:
                y = self.both(y, self.box(row, x, y, width), row)
        return y

    def both(self, top: float, bottom: float, box: Box) -> float:
        """The bar beside a box: what arrives, then what leaves."""
        middle = (top + bottom) / 2
        self.bar(top, middle, box.arrives)
        self.bar(middle, bottom, box.leaves)
        return bottom

    def side(self, row: Side, x: float, y: float, width: float) -> float:
        each = (width - GAP * (len(row.boxes) - 1)) / len(row.boxes)
        tall = max(self.box(b, x, y, each, draw=False) for b in row.boxes) - y
        for i, b in enumerate(row.boxes):
            self.box(b, x + i * (each + GAP), y, each, tall=tall)
        return self.both(y, y + tall, row.boxes[-1])

    def frame(self, frame: Frame, x: float, y: float, width: float) -> float:
        top, at = y, len(self.d.shapes)
        title = frame.name + (f"  x {frame.times}" if frame.times > 1 else "")
        y += PAD + 10
        of = width_of(frame.of, SMALL)
        room = width - 2 * PAD - (of + 12 if of < width / 2 else 0)
        self.d.write(x + PAD, y, fit(title, room, 13 * BOLD), size=13, bold=True)
        if of < width / 2:
            self.d.write(x + width - PAD, y, frame.of, size=SMALL, fill="dim", anchor="end")
        y += 9
        self.bar(top, y, State())
        y = self.rows(frame.rows, x + PAD, y, width - 2 * PAD)
        self.bar(y, y + PAD, State())
        y += PAD
        inside = self.d.shapes[at:]
        del self.d.shapes[at:]
        if frame.times > 1:  # as a stack of paper
            self.d.rect(x + 5, top + 5, width - 1, y - top - 1, "card", "line", radius=6)
        self.d.rect(x, top, width, y - top, "card", "dim" if frame.block else "line", radius=6)
        self.d.shapes.extend(inside)
        return y + (5 if frame.times > 1 else 0)

    def border(self, border: Border, x: float, y: float, width: float) -> float:
        of = f"{size(border.bytes)}" if border.bytes else ""
        text = f"{border.where}: {border.words}" if border.where else border.words
        inner = width - 2 * PAD
        right = width_of(of, SMALL) + 8
        lines = wrap(text, inner - right, 12 * BOLD)
        more = wrap(border.reason, inner, SMALL, 2) if border.reason else []
        beside = bool(more) and len(lines) == 1 and width_of(text, 12 * BOLD) + width_of(border.reason, SMALL) + right + 20 < inner
        tall = 8 + LINE * len(lines) + (0 if beside else (LINE - 1) * len(more))
        self.d.rect(x, y, width, tall, "sent", "tp", radius=tall / 2 if len(lines) + len(more) < 3 else 8)
        at = y + LINE
        for i, line in enumerate(lines):
            self.d.write(x + PAD, at, line, bold=True)
            if i == 0:
                self.d.write(x + width - PAD, at, of, size=SMALL, anchor="end")
                if beside:
                    self.d.write(x + width - PAD - right, at, border.reason, size=SMALL, fill="dim", anchor="end")
            at += LINE
        for line in () if beside else more:
            self.d.write(x + PAD, at - 2, line, size=SMALL, fill="dim")
            at += LINE - 1
        self.bar(y, y + tall / 2, State())
        if border.forward == "all-gather" or (self.now, border.forward) == ("partial", "all-reduce"):
            self.now = "whole"
        elif (self.now, border.forward) == ("partial", "reduce-scatter"):
            self.now = "tokens"
        self.bar(y + tall / 2, y + tall, State())
        return y + tall

    def box(self, box: Box, x: float, y: float, width: float, *, draw: bool = True, tall: float = 0) -> float:
        """One box; returns where it ends."""
        glyph = GLYPH + 10 if box.cut else 0
        inner = width - 2 * PAD - glyph
        title = box.name + (f"  x {box.times}" if box.times > 1 else "")
        of = width_of(box.of, SMALL)
        own_line = of + width_of(title, 13 * BOLD) + 12 > inner
        lines: list[tuple[str, str]] = [(line, "ink") for line in wrap(box.style, inner, 12, 4)]
        lines += [(line, "dim") for line in self._weights(box, inner)]
        lines += [(line, "dim") for line in self._states(box, inner)]
        lines += [(line, "dim") for note in box.notes for line in wrap(note, inner, SMALL, 2)]
        if (box.cut == "whole" and box.reason and any(len(w.whole) > 1 for w in box.weights)) or (
            box.cut and not box.weights and box.reason
        ):
            lines += [(line, "dim") for line in wrap(f"because: {box.reason}", inner, SMALL, 3)]
        if not box.of:  # an operation: one line
            text = [line for line in wrap(f"{title}: {box.style}", width - 2 * PAD, 12, 3)]
            end = y + max(tall, 8 + LINE * len(text))
            if draw:
                self.d.rect(x, y, width, end - y, "", "line", radius=8, dash="dashed")
                for i, line in enumerate(text):
                    self.d.write(x + PAD, y + LINE * (i + 1), line, fill="dim")
            return end
        end = y + max(
            tall, PAD + 12 + (LINE if own_line and box.of else 0) + LINE * len(lines) + 5, GLYPH + 2 * PAD if glyph else 0
        )
        if not draw:
            return end
        tip = f"{box.name} ({box.of}): {box.style}" + (f"; {box.reason}" if box.reason else "")
        self.d.rect(x, y, width, end - y, "box", box.cut or "line", radius=5, text=tip)
        if glyph:
            _glyph(self.d, x + PAD, y + PAD, GLYPH, box.cut, self.tp)
        left, at = x + PAD + glyph, y + PAD + 9
        self.d.write(left, at, fit(title, inner if own_line else inner - of - 10, 13 * BOLD), size=13, bold=True)
        if own_line:
            at += LINE
            self.d.write(left, at, fit(box.of, inner, SMALL), size=SMALL, fill="dim")
        else:
            self.d.write(x + width - PAD, at, box.of, size=SMALL, fill="dim", anchor="end")
        for line, fill in lines:
            at += LINE
            self.d.write(left, at, line, size=12 if fill == "ink" else SMALL, fill=fill)
        return end

    def _weights(self, box: Box, inner: float) -> list[str]:
        """Its parameters, whole -> on a rank; small ones of one dim are left to the table."""
        shown = [w for w in box.weights if len(w.whole) > 1] or list(box.weights[:1])
        texts = [w.words if len(shown) == 1 else f"{w.name} {w.words}" for w in shown]
        if len(shown) == 1 or len(shown) > 4:
            return [line for line in wrap("; ".join(texts), inner, SMALL, 4)]
        return [line for t in texts for line in wrap(t, inner, SMALL, 2)]

    def _states(self, box: Box, inner: float) -> list[str]:
        a, b = box.arrives.words, box.leaves.words
        if not a and not b:
            return []
        if a == b:
            return wrap(f"reads and gives {a}", inner, SMALL, 2)
        both = "; ".join([*([f"reads {a}"] if a else []), *([f"gives {b}"] if b else [])])
        if width_of(both, SMALL) <= inner:
            return [both]
        return [
            line for text in ([f"reads {a}"] if a else []) + ([f"gives {b}"] if b else []) for line in wrap(text, inner, SMALL, 2)
        ]


def _stripe(d: Drawing, x: float, top: float, bottom: float, kind: str) -> None:
    """A length of the bar at the left."""
    if kind in ("features", "split"):
        for dx in (-3, 3):
            d.line(((x + dx, top), (x + dx, bottom)), "features", 2.5)
    elif kind == "unknown":
        d.line(((x, top), (x, bottom)), "line", 2)
    else:
        dash = {"tokens": "dashed", "partial": "dotted"}.get(kind, "")
        d.line(((x, top), (x, bottom)), kind, 7 if kind == "whole" else 5, dash)


def _glyph(d: Drawing, x: float, y: float, side: float, cut: str, tp: int) -> None:
    """A square that is cut as the weight is, with one rank's share filled."""
    n = max(1, min(tp, MOST_STRIPES))
    name = {"columns": "columns", "rows": "rows", "tokens": "tokens"}.get(cut, "whole")
    if cut in ("whole", "tokens") or n == 1:
        d.rect(x, y, side, side, name, name, radius=2)
        return
    step = side / n
    d.rect(x, y, step if cut == "columns" else side, side if cut == "columns" else step, name)
    for i in range(1, n):
        at = (x + i * step, y, x + i * step, y + side) if cut == "columns" else (x, y + i * step, x + side, y + i * step)
        d.line((at[:2], at[2:]), name)
    d.rect(x, y, side, side, "", name)
