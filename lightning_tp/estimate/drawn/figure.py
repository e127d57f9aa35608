"""Figures by matplotlib: one style, files of three formats, and inline SVG for pages.

matplotlib is the optional extra `plot`, so it is imported inside the functions that draw. Colors and fills read on white and on black; text
and lines have the color `INK`, which a page replaces by the color of its own text.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lightning_tp.core.files import check_file
from lightning_tp.errors import TPError

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png", ".pdf")
WIDE, NARROW = 8.8, 3.8  # inches of a figure on a page and on a phone, 100 pixels each
CHARACTER = 0.063  # inches that a character of the text of a figure takes, on the wide side: readers have other fonts
INK = "#1b1f24"
DIM: dict[str, Any] = {"color": INK, "alpha": 0.72}  # text beside the main one
ALARM = "#d9534f"
GRAY = "#8a929a"
STYLE: Any = {  # for `matplotlib.rc_context`
    "font.size": 8.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "text.parse_math": False,  # a name from the model may have dollar signs
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "lightning-tp",  # the same bytes each time
}


class Chart(NamedTuple):
    """A chart that is still to be drawn."""

    title: str  # what it shows; also for readers who can't see it
    height: float  # inches of its axes
    draw: Callable[[Axes], None]  # put it on axes
    legend: Mapping[str, str] = MappingProxyType({})  # what the colors mean: text -> color
    ticks: bool = True  # whether the axes have ticks


def figure_of(charts: Sequence[Chart], width: float = WIDE) -> Figure:
    """Draw charts below each other, each with its legend.

    Example:
        >>> figure = figure_of([Chart("Squares", 2.0, lambda axes: axes.bar([1, 2], [1, 4]))])
        >>> figure.axes[0].get_title(loc="left"), [int(bar.get_height()) for bar in figure.axes[0].patches]
        ('Squares', [1, 4])
    """
    import matplotlib
    from matplotlib.patches import Patch

    titles = [textwrap.fill(chart.title, int(width / CHARACTER / 1.4)) for chart in charts]
    columns = [max(1, int(width / (CHARACTER * max(map(len, chart.legend), default=1) + 0.6))) for chart in charts]
    above = [0.1 + 0.17 * (title.count("\n") + 1) for title in titles]
    ticks = [0.3 if chart.ticks else 0.0 for chart in charts]
    below = [t + 0.17 * -(-len(chart.legend) // n) + 0.15 for chart, n, t in zip(charts, columns, ticks)]
    total = sum(chart.height + a + b for chart, a, b in zip(charts, above, below))
    with matplotlib.rc_context(STYLE):
        figure, top = new_figure((width, total), layout=None), total
        for i, chart in enumerate(charts):
            left, bottom = 0.08 + 1.3 * ticks[i], top - above[i] - chart.height
            axes = figure.add_axes((left / width, bottom / total, 1 - (left + 0.12) / width, chart.height / total))
            axes.set_title(titles[i])
            chart.draw(axes)
            if chart.legend:
                handles = [Patch(color=color, label=text) for text, color in chart.legend.items()]
                corner = (0, -ticks[i] / chart.height)
                axes.legend(
                    handles=handles, loc="upper left", bbox_to_anchor=corner, ncols=columns[i], borderaxespad=0, borderpad=0.3
                )
            top = bottom - below[i]
    return figure


def new_figure(size: tuple[float, float], layout: Literal["constrained"] | None = "constrained") -> Any:
    """Make a figure of a size in inches that belongs to no window."""
    from matplotlib.figure import Figure

    return Figure(size, layout=layout)


def save(figure: Figure, path: str | Path, title: str = "") -> None:
    """Write a figure as .svg, .png or .pdf, the same bytes each time; `TPError` if the file can't be written."""
    import matplotlib

    suffix = Path(path).suffix.lower()
    metadata = {"Title": title, **{".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(suffix, {})}
    try:
        with matplotlib.rc_context(STYLE):
            figure.savefig(path, dpi=200, metadata=metadata)
    except OSError as error:
        raise TPError(f"`{path}` can't be written: {error.strerror or error}.") from None


def inline_svg(figure: Figure, title: str, css_class: str = "") -> Markup:
    """Return a figure as an SVG element for inside a page, in the page's text color and without a background.

    The title says what it shows to readers who can't see it; two figures on one page that show the same differ by their `css_class`.
    """
    import matplotlib
    from markupsafe import Markup

    text = io.StringIO()
    # ids are hashes of what they name: salted, so that figures of one page share none, as one in a hidden figure names nothing
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": f"{title} {css_class}"}):
        figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    body = text.getvalue().partition("<svg ")[2].partition(">")[2].replace(INK, "currentColor")
    body = re.sub(r' id="[\w.]+_\d+"|<style.*?</style>|font-family: [^;"]*;? ?|(?<=>)\s+(?=<)', "", body)  # the page's own font
    body = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+|\s*\n", r"\1", path[0]), body)  # a tenth of a point is enough
    size = " ".join(f"{72 * inches:g}" for inches in figure.get_size_inches())
    head = Markup('<svg class="{}" viewBox="0 0 {}" role="img" aria-label="{}">').format(css_class, size, title)
    return head + Markup(body)


def check_plot(path: str | Path, option: str = "path") -> None:
    """Refuse a figure's file that could not be written in the end; to be called before the work begins.

    `TPError` for another file name extension than .svg, .png or .pdf, without matplotlib, or as `check_file`.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise TPError(f"`{option} {path}`: the file name extension selects the format. Use one of {', '.join(SUFFIXES)}.")
    check_file(path, option)
    check_matplotlib(f"`{option} {path}`")


def check_matplotlib(what: str) -> None:
    """Raise a TPError that says how to install matplotlib, if it is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise TPError(f'{what} needs matplotlib: pip install "lightning-tp[plot]"') from None
