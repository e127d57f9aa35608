"""Charts of an estimate: memory over a step and at its peak, collectives of the blocks, where the time goes, the roofline."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_tp.core.units import seconds, share, size
from lightning_tp.estimate.drawn.figure import ALARM, CHARACTER, GRAY, INK, WIDE, Chart, check_plot, figure_of, save
from lightning_tp.estimate.drawn.series import (
    AXES,
    PHASES,
    block_collectives,
    color_of,
    kinds_of,
    memory_series,
    roofline_points,
    time_parts,
)
from lightning_tp.estimate.report.step import StepReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_BARS = 14
LINE = 0.145  # inches of a line of text; a bar is as high, and so are the gap and half a line more below it
VISIBLE = 0.01  # of the peak: kinds of memory that are never more are drawn as one


def plot(found: StepReport, path: str | Path) -> None:
    """Write charts of memory, collectives and time; see `Estimate.plot`."""
    check_plot(path)
    charts = (memory_over_step, memory_at_peak, collectives, time_of_step)
    save(figure_of([chart(found, WIDE) for chart in charts]), path, f"{found.model}: memory, collectives and time of a step")


def memory_over_step(found: StepReport, width: float) -> Chart:
    """Stack the bytes of each kind at each moment of the step."""
    moments, peak = found.memory.timeline, found.memory.peak
    most, limit = max(m.total for m in moments), found.hardware.usable_bytes
    top = max(most, limit) if limit < 2.5 * most else most
    unit, scale = ("GiB", 2**30) if top > 2**30 else ("MiB", 2**20) if top > 2**20 else ("KiB", 2**10)
    series = _visible(memory_series(found), most)

    def draw(axes: Axes) -> None:
        tops = [n / scale for n in map(sum, zip(*series.values()))]
        for kind, values in reversed(series.items()):  # each down to the axis, the next one over it: half the points of a stackplot
            axes.stairs(tops, range(len(moments) + 1), fill=True, color=color_of(kind), label=kind)
            tops = [top - n / scale for top, n in zip(tops, values)]
        axes.set(xlim=(0, len(moments)), ylim=(0, 1.15 * top / scale))
        axes.grid(axis="y", color=GRAY, alpha=0.3)
        at = moments.index(peak)
        side = "left" if at < len(moments) / 2 else "right"
        style: Any = {"textcoords": "offset points", "ha": side, "weight": "bold"}
        axes.annotate(f"peak {size(peak.total)}", (at + 0.5, peak.total / scale), (0, 5), **style)
        axes.plot([at + 0.5], [peak.total / scale], ".", color=INK)
        if limit <= top:
            axes.axhline(limit / scale, color=ALARM, linestyle="--")
        phases = [(name, [i for i, _ in group]) for name, group in groupby(enumerate(map(_phase, moments)), key=lambda x: x[1])]
        long = [(name, of) for name, of in phases if len(of) / len(moments) > 0.7 / width]
        axes.set_xticks([(of[0] + of[-1] + 1) / 2 for _, of in long], [name for name, _ in long])
        axes.tick_params(axis="x", length=0)
        for _, indices in phases[1:]:
            axes.axvline(indices[0], color=INK, alpha=0.5, linewidth=0.6)

    legend = {kind: color_of(kind) for kind in reversed(series)}
    if limit <= top:
        legend[f"available on {found.hardware.name}: {size(limit)}"] = ALARM
    return Chart(f"Memory of a rank over a step, {unit}", 2.0, draw, legend)


def memory_at_peak(found: StepReport, width: float) -> Chart:
    """Draw the bytes of each kind at the peak beside what a device has."""
    peak, limit = found.memory.peak, found.hardware.usable_bytes
    kinds = kinds_of([peak])
    total = f"total: {size(peak.total)}, {share(peak.total, limit)} of the {size(limit)} available on {found.hardware.name}"
    bars = [Bar(total, [(color_of(k), peak.kinds[k]) for k in kinds])]
    large = [k for k in kinds if peak.kinds[k] >= 0.005 * peak.total]
    for kind in sorted(large, key=lambda k: -peak.kinds[k]):
        n = peak.kinds[kind]
        bars.append(Bar(f"{kind}: {size(n)}, {share(n, peak.total)}", [(color_of(kind), n)]))
    if len(large) < len(kinds):
        bars.append(Bar(f"all others: {size(peak.total - sum(peak.kinds[k] for k in large))}", []))
    return _bars(f"Memory at the peak: {peak.name}", bars, width, {"available": ALARM}, limit)


def collectives(found: StepReport, width: float) -> Chart:
    """Draw the bytes of each kind of collective in a block."""
    rows = sorted(block_collectives(found), key=lambda r: -r.bytes * r.each)
    bars = []
    for r in rows[:MOST_BARS]:
        many, blocks = f"{r.each} x " if r.each > 1 else "", f" in each of {r.blocks}" if r.blocks > 1 else ""
        text = f"{r.where}, {r.phase}: {many}{r.kind} over {r.axis}={r.ranks}: {size(r.bytes * r.each)}{blocks}"
        bars.append(Bar(text, [(AXES[r.axis], r.bytes * r.each)]))
    if len(rows) > MOST_BARS:
        bars.append(Bar(f"and {len(rows) - MOST_BARS} more of at most {size(rows[MOST_BARS].bytes * rows[MOST_BARS].each)}", []))
    names = {"tp": "tensor-parallel group", "dp": "data-parallel group (FSDP2)"}
    legend = {names[axis]: color for axis, color in AXES.items() if any(r.axis == axis for r in rows)}
    bars = bars or [Bar("none: there is one rank on each axis", [])]
    return _bars("Collectives of a step, bytes in one block", bars, width, legend)


def time_of_step(found: StepReport, width: float) -> Chart:
    """Draw the seconds of a step by part, with and without overlap."""
    parts, t = time_parts(found), found.time
    bars = [
        Bar(f"with overlap: {seconds(t.step)}", [(p.color, p.exposed) for p in parts]),
        Bar(f"without overlap: {seconds(t.without_overlap)}", [(p.color, p.total) for p in parts]),
    ]
    more = [f" exposed of {seconds(p.total)}" if p.total > p.exposed else "" for p in parts]
    legend = {f"{p.name}: {seconds(p.exposed)}{text}": p.color for p, text in zip(parts, more)}
    return _bars("Time of a step", bars, width, legend)


def roofline(found: StepReport, width: float) -> Chart:
    """Place the matmuls of a rank under the roofline of the device: FLOPs per byte moved, and FLOP/s."""
    points, bandwidth, peak = roofline_points(found), found.hardware.memory_bandwidth, found.peak_flops
    ridge = peak / bandwidth
    phases = [phase for phase in PHASES if any(p.phase == phase for p in points)]

    def draw(axes: Axes) -> None:
        low, high = min([p.intensity for p in points] + [ridge]) / 2, max([p.intensity for p in points] + [ridge]) * 2
        axes.loglog([low, ridge, high], [low * bandwidth / 1e12, peak / 1e12, peak / 1e12], color=GRAY, linewidth=2)
        for phase in phases:
            of = [p for p in points if p.phase == phase]
            fill = PHASES[phase] if phase == "forward" else "none"  # rings around those of the forward, which have the same place
            x, y = [p.intensity for p in of], [p.flops_per_s / 1e12 for p in of]
            axes.scatter(x, y, s=18 if phase == "forward" else 60, facecolor=fill, edgecolor=PHASES[phase])
        lowest = min([p.flops_per_s for p in points] + [peak / 10]) / 1e12
        axes.set(xlim=(low, high), ylim=(lowest / 2, 2 * peak / 1e12))
        axes.minorticks_off()
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(color=GRAY, alpha=0.3)

    legend = {phase: PHASES[phase] for phase in phases}
    return Chart("Matmuls under the roofline, TFLOP/s by FLOPs per byte moved", 1.9, draw, legend)


# ------------------------------------------------------------------------------------------------------------------ parts


class Bar(NamedTuple):
    """A horizontal bar of (color, value) behind each other, below a text."""

    text: str
    parts: Sequence[tuple[str, float]]


def _bars(title: str, bars: Sequence[Bar], width: float, legend: Mapping[str, str] | None = None, limit: float = 0) -> Chart:
    """Draw bars below each other on one scale, and a line at `limit` across the first."""
    texts = [textwrap.fill(bar.text, int(width / CHARACTER)) for bar in bars]
    tops = [*accumulate((text.count("\n") + 1 + (1.7 if bar.parts else 0.0) for text, bar in zip(texts, bars)), initial=0.0)]
    most = max([limit, *(sum(value for _, value in bar.parts) for bar in bars)]) or 1

    def draw(axes: Axes) -> None:
        for bar, text, top, end in zip(bars, texts, tops, tops[1:]):
            axes.text(0, top + 0.1, text, va="top", linespacing=1.1)
            values = [value for _, value in bar.parts]
            left = [*accumulate(values, initial=0.0)][:-1]
            axes.barh([end - 1.1] * len(values), values, 0.95, left, color=[color for color, _ in bar.parts])
        axes.set(xlim=(0, 1.005 * most), ylim=(tops[-1], 0))
        axes.axis("off")
        if limit:
            axes.vlines(limit, tops[1] - 1.8, tops[1] - 0.4, color=ALARM, linewidth=2)

    return Chart(title, LINE * tops[-1], draw, legend or {}, ticks=False)


def _visible(series: Mapping[str, list[int]], most: int) -> dict[str, list[int]]:
    """Add up what is never high enough to be seen, as the lowest of the stack."""
    visible = {kind: values for kind, values in series.items() if max(values) >= VISIBLE * most}
    rest = [values for kind, values in series.items() if kind not in visible]
    return {f"{len(rest)} smaller kinds": list(map(sum, zip(*rest))), **visible} if len(rest) > 1 else dict(series)


def _phase(moment: object) -> str:
    name = getattr(moment, "name", "")
    return "forward" if name.startswith("forward") else "optimizer" if name.startswith("step") else "backward"
