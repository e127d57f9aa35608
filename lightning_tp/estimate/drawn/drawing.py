"""A drawing of rectangles, lines and text, written as SVG without any library, or as PNG and PDF through matplotlib.

One drawing serves all: the SVG inside a page (colors by the page's theme), an SVG file of its own, a picture for a paper. Colors
go by name. Widths of text are estimated, on the wide side, since nobody knows the reader's fonts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from lightning_tp.core.files import check_file, write_text
from lightning_tp.errors import TPError

SUFFIXES = (".svg", ".png", ".pdf")


FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif"


EM = 0.56  # width of a letter, of the size of the text


BOLD = 1.14  # how much wider bold ones are


DASHES = {"": "", "dashed": "5 4", "dotted": "1.5 3.5"}


COLORS = {  # name -> (on a light page, on a dark one)
    "page": ("#ffffff", "#14171a"),
    "card": ("#f4f6f8", "#1e2328"),
    "box": ("#ffffff", "#252b31"),
    "ink": ("#1b1f24", "#e8eaed"),
    "dim": ("#57606a", "#a3adb8"),
    "line": ("#c9d0d7", "#424b55"),
    "alarm": ("#b42318", "#ff8f85"),
    # memory: what lasts is blue, what FSDP2 makes violet, activations warm
    "parameters": ("#174a7e", "#5b9be6"),
    "gradients": ("#2f78bd", "#3f78b8"),
    "optimizer": ("#74abdf", "#2c5a90"),
    "buffers": ("#bcd7f0", "#1f3f66"),
    "optimizer's scratch": ("#98a4b0", "#6b7884"),
    "gathered parameters": ("#553c9a", "#a68ae6"),
    "unsharded gradients": ("#8f74cf", "#7d62c0"),
    "FSDP2 buffers": ("#c9b8ea", "#58428f"),
    "attention": ("#a8400f", "#f29a68"),
    "MLP": ("#e07b2e", "#d3752f"),
    "norms": ("#f3ae6d", "#9c551d"),
    "residual": ("#f8d9b0", "#6e4217"),
    "embedding": ("#20704f", "#57bd92"),
    "logits and loss": ("#5fae7f", "#2f8059"),
    "other": ("#8a8f94", "#8d959d"),
    "backward": ("#a12a5e", "#e480ab"),
    # splits
    "columns": ("#12714f", "#4cc296"),
    "rows": ("#b4541a", "#f29a68"),
    "vocabulary": ("#6a3fa0", "#b794f0"),
    "tokens": ("#0a6d8a", "#55bfdd"),
    "whole": ("#6b7580", "#97a1ac"),
    "features": ("#12714f", "#4cc296"),
    "partial": ("#a12a5e", "#e480ab"),
    "tp": ("#b7791f", "#e8b04b"),
    "dp": ("#3c6fb0", "#79aef0"),
    "sent": ("#fdf0cf", "#463611"),
}


SPARE = ("#7f6a55", "#0f8b8d", "#8d5b9c", "#6d8f2b")  # for kinds that nobody has named here


def color(name: str, dark: bool = False) -> str:
    """The color of that name; a name that is not known has one of its own, the same each time."""
    found = COLORS.get(name)
    return found[dark] if found is not None else SPARE[sum(map(ord, name)) % len(SPARE)]


def width_of(text: str, size: float) -> float:
    """About how wide a line of text is, in pixels."""
    return EM * size * len(text)


def fit(text: str, width: float, size: float) -> str:
    """The text, with its middle left out where it is too long.

    Example:
        >>> fit("model.layers.0.self_attn.q_proj", 100, 12)
        'model..._proj'
    """
    most = max(4, int(width / (EM * size)))
    if len(text) <= most:
        return text
    head = (most - 3) // 2
    return text[:head] + "..." + text[len(text) - (most - 3 - head) :]


def wrap(text: str, width: float, size: float, most: int = 99) -> list[str]:
    """Lines no wider than that; the last of `most` ends in dots if there is more."""
    limit = max(8, int(width / (EM * size)))
    lines, line = [], ""
    for word in text.split():
        word = fit(word, width, size)
        if line and len(line) + 1 + len(word) > limit:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    lines.append(line)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1][: limit - 2].rstrip(" ,;:") + ".."]
    return lines


@dataclass(frozen=True)
class Shape:
    """A filled polygon or rectangle, a line, or a text; positions in pixels, y downwards."""

    kind: str  # "rect", "area", "line", "text"
    points: tuple[tuple[float, float], ...]
    fill: str = ""
    stroke: str = ""
    width: float = 1
    radius: float = 0
    dash: str = ""
    text: str = ""
    size: float = 12
    bold: bool = False
    anchor: str = "start"


@dataclass
class Drawing:
    """Shapes on a page of a size; `label` says in words what it shows."""

    width: float
    height: float = 0
    label: str = ""
    shapes: list[Shape] = field(default_factory=list)

    def rect(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        fill: str = "",
        stroke: str = "",
        *,
        radius: float = 0,
        dash: str = "",
        text: str = "",
    ) -> None:
        """A rectangle; `text` is shown when a pointer rests on it."""
        self.shapes.append(Shape("rect", ((x, y), (max(0.0, w), max(0.0, h))), fill, stroke, 1, radius, dash, text))

    def area(self, points: Iterable[tuple[float, float]], fill: str, text: str = "") -> None:
        """A polygon."""
        self.shapes.append(Shape("area", tuple(points), fill, text=text))

    def line(self, points: Iterable[tuple[float, float]], stroke: str, width: float = 1, dash: str = "") -> None:
        """A line through points."""
        self.shapes.append(Shape("line", tuple(points), "", stroke, width, 0, dash))

    def write(
        self, x: float, y: float, text: str, *, size: float = 12, fill: str = "ink", bold: bool = False, anchor: str = "start"
    ) -> None:
        """A line of text on the base line `y`; anchored at its "start", "middle" or "end"."""
        self.shapes.append(Shape("text", ((x, y),), fill, text=text, size=size, bold=bold, anchor=anchor))

    def put(self, other: Drawing, x: float, y: float) -> None:
        """All of another drawing, with its corner here."""
        for s in other.shapes:
            first, *rest = s.points
            moved = ((first[0] + x, first[1] + y), *(rest if s.kind == "rect" else [(a + x, b + y) for a, b in rest]))
            self.shapes.append(Shape(s.kind, moved, *[getattr(s, n) for n in list(Shape.__dataclass_fields__)[2:]]))

    # ----------------------------------------------------------------------------------------------------------- SVG

    def svg(self, *, alone: bool = False, name: str = "") -> str:
        """As an SVG element: for inside a page whose style has `style_of`, or `alone` with its own colors and background."""
        body = [_svg(s) for s in self.shapes]
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(self.width)} {_n(self.height)}" width="{_n(self.width)}" '
            f'height="{_n(self.height)}" role="img" aria-label="{escape(self.label)}">'
            if alone
            else f'<svg viewBox="0 0 {_n(self.width)} {_n(self.height)}" role="img" aria-label="{escape(self.label)}"'
            f"{f' class={chr(34)}{name}{chr(34)}' if name else ''}>"
        )
        if alone:
            head += f"<style>{style_of()}</style>" + f'<rect width="{_n(self.width)}" height="{_n(self.height)}" class="f-page"/>'
        return head + "\n".join(body) + "</svg>"

    # -------------------------------------------------------------------------------------------------------- to a file

    def save(self, path: str | Path) -> None:
        """Write it as .svg, .png or .pdf (the last two through matplotlib).

        Raises:
            TPError: as `check_picture`.
        """
        check_picture(path)
        if Path(path).suffix.lower() == ".svg":
            write_text(path, self.svg(alone=True))
        else:
            self._matplotlib(path)

    def _matplotlib(self, path: str | Path) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import FancyBboxPatch, Polygon, Rectangle

        figure = Figure(figsize=(self.width / 100, self.height / 100))
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, self.width)
        axes.set_ylim(self.height, 0)
        axes.axis("off")

        def dash_of(s: Shape) -> Any:
            return (0, [float(n) / s.width for n in DASHES[s.dash].split()]) if s.dash else "-"  # in units of the width

        for order, s in enumerate(self.shapes):
            paint = {
                "zorder": order,
                "facecolor": color(s.fill) if s.fill else "none",
                "edgecolor": color(s.stroke) if s.stroke else "none",
                "linewidth": 0.72 * s.width,
                "linestyle": dash_of(s),
            }
            if s.kind == "rect":
                (x, y), (w, h) = s.points
                if s.radius:
                    r = min(s.radius, w / 2, h / 2)
                    style = f"round,pad=0,rounding_size={r}"
                    axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=style, mutation_aspect=1, **paint))
                else:
                    axes.add_patch(Rectangle((x, y), w, h, **paint))
            elif s.kind == "area":
                axes.add_patch(Polygon(s.points, closed=True, **paint))
            elif s.kind == "line":
                xs, ys = zip(*s.points)
                axes.plot(
                    xs,
                    ys,
                    color=color(s.stroke),
                    linewidth=0.72 * s.width,
                    linestyle=dash_of(s),
                    solid_capstyle="butt",
                    zorder=order,
                )
            else:
                axes.text(
                    *s.points[0],
                    s.text.replace("$", r"\$"),
                    fontsize=0.72 * 0.88 * s.size,  # its font is wider than those of browsers
                    color=color(s.fill),
                    fontweight="bold" if s.bold else "normal",
                    ha={"start": "left", "middle": "center", "end": "right"}[s.anchor],
                    va="baseline",
                    zorder=order,
                )
        try:
            figure.savefig(path, dpi=200, facecolor=color("page"), metadata={"Title": self.label[:200]})
        except OSError as error:
            raise TPError(f"`{path}` can't be written: {error.strerror or error}.") from None


def _svg(s: Shape) -> str:
    paint = f'class="{_class("f", s.fill) if s.fill else "f-"}{" " + _class("s", s.stroke) if s.stroke else ""}"'
    dash = f' stroke-dasharray="{DASHES[s.dash]}"' if s.dash else ""
    if s.kind == "rect":
        (x, y), (w, h) = s.points
        corner = f' rx="{_n(s.radius)}"' if s.radius else ""
        shape = f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(w)}" height="{_n(h)}" {paint}{corner}{dash}'
        return f"{shape}><title>{escape(s.text)}</title></rect>" if s.text else shape + "/>"
    if s.kind == "text":
        x, y = s.points[0]
        more = (' font-weight="600"' if s.bold else "") + (f' text-anchor="{s.anchor}"' if s.anchor != "start" else "")
        return f'<text x="{_n(x)}" y="{_n(y)}" font-size="{_n(s.size)}" {paint}{more}>{escape(s.text)}</text>'
    path = "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in s.points)
    if s.kind == "area":
        return f'<path d="{path}Z" {paint}>' + (f"<title>{escape(s.text)}</title>" if s.text else "") + "</path>"
    return f'<path d="{path}" {paint} stroke-width="{_n(s.width)}"{dash}/>'


def style_of() -> str:
    """The CSS that colors drawings: by the reader's theme, and light where it is printed."""

    def rules(dark: bool) -> str:
        return "".join(
            f".{_class('f', name)}{{fill:{color(name, dark)}}}.{_class('s', name)}{{stroke:{color(name, dark)}}}"
            for name in (*COLORS, *SPARE_NAMES)
        )

    return f"text{{font-family:{FONT}}}.f-{{fill:none}}{rules(False)}@media screen and (prefers-color-scheme:dark){{{rules(True)}}}"


SPARE_NAMES = tuple(f"spare{i}" for i in range(len(SPARE)))


COLORS.update({name: (SPARE[i], SPARE[i]) for i, name in enumerate(SPARE_NAMES)})


def _class(what: str, name: str) -> str:
    if name not in COLORS:
        name = SPARE_NAMES[sum(map(ord, name)) % len(SPARE)]
    return f"{what}-" + "".join(c if c.isalnum() else "-" for c in name)


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def under(parts: Sequence[Drawing], gap: float = 28) -> Drawing:
    """Drawings one under the other."""
    whole = Drawing(max(p.width for p in parts), label="; ".join(p.label for p in parts))
    y = gap / 2
    for part in parts:
        whole.put(part, 0, y)
        y += part.height + gap
    whole.height = y - gap / 2
    return whole


def check_picture(path: str | Path, option: str = "", *, always: bool = False) -> None:
    """Refuse a file that could not be written in the end; call it before the work begins. `always`: matplotlib draws an .svg, too.

    Raises:
        TPError: for another ending than .svg, .png or .pdf, matplotlib that is needed and not there, or as `check_file`.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise TPError(f"`{option or 'path'} {path}`: its ending says the format, and there are {', '.join(SUFFIXES)}.")
    check_file(path, option)
    if always or suffix != ".svg":
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            rest = "" if always else " An .svg needs nothing."
            raise TPError(
                f"`{option or 'path'} {path}`: {suffix} needs matplotlib: pip install 'lightning-tp[plot]'.{rest}"
            ) from None


def check_page(path: str | Path, option: str = "") -> None:
    """As `check_picture`, for a page.

    Raises:
        TPError: for another ending than .html, or as `check_file`.
    """
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise TPError(f"`{option or 'path'} {path}`: it is written as HTML; name it .html.")
    check_file(path, option)
