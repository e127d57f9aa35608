"""Reports as one HTML file each: no network, no scripts; for a screen of any width, light or dark, and for paper.

jinja2, which comes with torch, fills the templates beside this file and escapes all names, which come from the user's model. Figures are inline
SVG, each drawn twice, for wide and for narrow screens, of which a reader sees one; bars in tables are HTML.
"""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_tp._compat import version_of
from lightning_tp.core.files import check_file, write_text
from lightning_tp.core.units import count, seconds, share, size
from lightning_tp.errors import TPError
from lightning_tp.estimate.drawn import charts
from lightning_tp.estimate.drawn.figure import NARROW, WIDE, Chart, check_matplotlib, figure_of, inline_svg
from lightning_tp.estimate.drawn.picture import Picture
from lightning_tp.estimate.drawn.picture_from_trace import picture_from_trace
from lightning_tp.estimate.drawn.picture_render import draw_picture
from lightning_tp.estimate.drawn.series import block_collectives, color_of, kinds_of, stretches
from lightning_tp.estimate.report.step import StepReport, Table
from lightning_tp.estimate.report.tuning import TuningReport
from lightning_tp.plan.checked import CheckedPlan

if TYPE_CHECKING:
    from markupsafe import Markup

LARGEST = 15  # matmuls that are listed
ONE_SHEET = 2.2  # times its width that a picture may be high to be printed on one sheet


class TwoWidths(NamedTuple):
    """A figure as SVG for wide and for narrow screens; `css_class` says how it is printed."""

    wide: Markup
    narrow: Markup
    css_class: str = "one-sheet"


def check_page(path: str | Path, option: str = "path", *, figures: bool = False) -> None:
    """Refuse a page's file that could not be written in the end; to be called before the work begins.

    `TPError` for another file name extension than .html, as `check_file`, or without matplotlib if there are `figures`.
    """
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise TPError(f"`{option} {path}`: reports are written as HTML. Name the file .html.")
    check_file(path, option)
    if figures:
        check_matplotlib(f"`{option} {path}`")


def write_report(found: StepReport, path: str | Path, *, command: str = "") -> None:
    """Write an estimate as HTML (see `Estimate.html`); `TPError` as `check_page`."""
    check_page(path, figures=True)
    write_text(path, report(found, command=command))


def report(found: StepReport, *, command: str = "") -> str:
    """Return the HTML of an estimate."""
    picture = plan = None
    if found.traced is not None:
        plan, rank, whole = found.traced
        picture = _picture(picture_from_trace(found.model, plan, rank, whole))
    return _page(
        "report.html",
        title=f"{found.model} on {found.dp * found.tp:,} x {found.hardware.name}",
        command=command,
        found=found,
        facts=_facts(found),
        tables=found.tables(),
        memory_over_step=_chart(charts.memory_over_step, found),
        stretches=_stretches_table(found),
        memory_at_peak=_chart(charts.memory_at_peak, found),
        collectives=_chart(charts.collectives, found),
        blocks=_blocks_table(found),
        together=found.flops.rank * found.tp / max(1, found.flops.model),
        matmuls=_matmuls_table(found),
        ridge=found.peak_flops / found.hardware.memory_bandwidth,
        roofline=_chart(charts.roofline, found),
        time_of_step=_chart(charts.time_of_step, found),
        picture=picture,
        rules=None if plan is None else _rules_table(plan),
    )


def write_plan(plan: CheckedPlan, picture: Picture, path: str | Path, *, command: str = "", held: Sequence[str] = ()) -> None:
    """Write a plan as HTML: its picture, its table with the reasons, and lines on what a rank holds and sends; `TPError` as `check_page`."""
    check_page(path, figures=True)
    lines = [str(plan).splitlines()[0], *held]
    title = f"Sharding plan of {picture.model}, tp={picture.tp}"
    values = {"lines": lines, "picture": _picture(picture), "rules": _rules_table(plan)}
    write_text(path, _page("plan.html", title=title, command=command, **values))


def write_choices(found: TuningReport, path: str | Path, *, command: str = "") -> None:
    """Write what `tune` found as HTML: what fits, with its memory, the fastest first, and what does not; `TPError` as `check_page`."""
    check_page(path)
    fits = found.fits
    title = f"{fits[0].model} on {found.gpus:,} x {fits[0].hardware.name}" if fits else f"{found.gpus:,} devices"
    kinds = kinds_of([e.memory.peak for e in fits])
    refused = [(r.what, r.why) for r in found.refused]
    text = _page(
        "choices.html",
        title=f"{title}: configurations that fit in memory",
        command=command,
        found=found,
        colors={kind: color_of(kind) for kind in kinds},
        most=max((max(e.memory.peak.total, e.hardware.usable_bytes) for e in fits), default=1.0),
        refused=Table("Configurations that are not possible", ("configuration", "reason"), refused),
    )
    write_text(path, text)


# -------------------------------------------------------------------------------------------------------------- sections


def _facts(found: StepReport) -> list[tuple[str, str, str]]:
    """List (name, value, note) of the numbers at the top of a report."""
    batch = f"{found.batch} x {found.accumulate}" if found.accumulate > 1 else str(found.batch)
    return [
        ("parameters", count(found.parameters), f"{count(found.held)} per rank"),
        ("mesh", f"tp={found.tp} x dp={found.dp}", f"{found.dp * found.tp:,} devices"),
        ("micro-batch", batch, f"{found.tokens:,} {found.unit} per step"),
        ("memory", size(found.needed), f"of {size(found.hardware.memory_bytes)}, with overhead"),
        ("step time", seconds(found.time.step), f"{seconds(found.time.without_overlap)} without overlap"),
        (f"{found.unit}/s", f"{found.tokens_per_s:,.0f}", f"{found.tokens_per_s_per_device:,.0f} per device"),
        ("MFU", f"{found.mfu:.1%}", f"of {found.peak_flops / 1e12:,.0f} TFLOP/s"),
    ]


def _stretches_table(found: StepReport) -> Table:
    rows = [(s.name, size(s.begin), size(s.end), size(s.most)) for s in stretches(found)]
    return Table("Allocated bytes over the step", ("moments", "first", "last", "maximum"), rows, (1, 2, 3))


def _blocks_table(found: StepReport) -> Table:
    rows = [
        (r.where, r.phase, r.kind, r.axis, f"{r.ranks:,}", size(r.bytes), str(r.each), f"{r.blocks:,}", size(r.total))
        for r in block_collectives(found)
    ]
    header = ("where", "phase", "kind", "axis", "ranks", "bytes each", "per block", "blocks", "total")
    return Table("Collectives of a step by block", header, rows, (4, 5, 6, 7, 8))


def _matmuls_table(found: StepReport) -> Table:
    total, ridge = sum(p.flops for p in found.products), found.peak_flops / found.hardware.memory_bandwidth
    rows = []
    for p in found.products[:LARGEST]:
        sizes = f"{p.m:,} x {p.k:,} times {p.k:,} x {p.n:,}" if p.k else "a convolution"
        if p.kind == "attention":
            sizes = f"{p.m:,} queries, {p.n:,} keys of {p.k:,}"
        many = f"{p.batch:,} x " if p.batch > 1 else ""
        intensity = p.flops / p.count / p.bytes if p.bytes else math.inf
        bound = "compute" if intensity >= ridge else "memory"
        cells = (f"{p.count:,}", _flop(p.flops), share(p.flops, total), f"{intensity:,.0f}", bound)
        rows.append((p.module or "(the model)", p.phase, many + sizes, *cells))
    header = ("module", "phase", "sizes", "count", "FLOPs", "share", "FLOPs/byte", "bound by")
    return Table(f"The largest {len(rows)} of {len(found.products)} kinds of matmuls on a rank", header, rows, (3, 4, 5, 6))


def _rules_table(plan: CheckedPlan) -> Table:
    total, held = plan.numel, max(map(plan.local_numel, range(plan.tp)))
    caption = f"The plan ({plan.source}): {total:,} parameters, up to {held:,} per rank at tp={plan.tp}"
    return Table(caption, ("modules", "style", "full shape -> local shard", "reason"), plan.rows)


# ----------------------------------------------------------------------------------------------------------------- parts


def _page(template: str, **values: Any) -> str:
    """Fill a template of this package."""
    import jinja2

    how: Any = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=jinja2.PackageLoader(__package__), **how)
    environment.filters |= {"size": size, "seconds": seconds, "flop": _flop, "breakable": _breakable}
    names = ("lightning-tp", "torch", "lightning", "transformers")
    versions = [f"{n} {v}" for n in names if (v := version_of(n))]
    made = ", ".join([date.today().isoformat(), *versions, f"Python {platform.python_version()}"])
    return environment.get_template(template).render(made=made, **values)


def _chart(chart: Callable[[StepReport, float], Chart], found: StepReport) -> TwoWidths:
    return TwoWidths(*(_svg(chart(found, width), width) for width in (WIDE, NARROW)))


def _svg(chart: Chart, width: float) -> Markup:
    return inline_svg(figure_of([chart], width), chart.title, "wide" if width == WIDE else "narrow")


def _picture(picture: Picture) -> TwoWidths:
    wide, narrow = draw_picture(picture, WIDE), draw_picture(picture, NARROW)
    css_class = "one-sheet" if wide.get_figheight() < ONE_SHEET * WIDE else ""
    return TwoWidths(inline_svg(wide, picture.title, "wide"), inline_svg(narrow, picture.title, "narrow"), css_class)


def _breakable(text: str) -> Markup:
    """Let long names break behind a dot."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"\.(?=[A-Za-z_*{])", ".<wbr>", escape(text)))


def _flop(n: float) -> str:
    """Format FLOPs: "1.84 PFLOP"."""
    for unit, scale in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return f"{n:,.0f} FLOP"
