"""The plots of an estimate, as drawings: memory over a step and at its peak, collectives of the blocks, and where the time goes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_tp.core.units import seconds, share, size
from lightning_tp.estimate.drawn.drawing import BOLD, Drawing, fit, width_of, wrap
from lightning_tp.estimate.drawn.picture_drawing import NARROW, WIDE
from lightning_tp.estimate.drawn.series import block_collectives, kinds_of, memory_series, roofline_points, time_parts
from lightning_tp.estimate.report.step import StepReport

GiB = 2**30
MOST_BARS = 14


def memory_over_step(found: StepReport, width: float = WIDE) -> Drawing:
    """Bytes of a rank by kind at each moment, stacked."""
    series, moments, peak = memory_series(found), found.memory.timeline, found.memory.peak
    most = max(m.total for m in moments)
    limit = found.hardware.usable_bytes
    top_value = max(most, limit) if limit < 2.5 * most else most
    d = Drawing(width, label=f"Memory of a rank over a step, most at the {peak.name}: {size(peak.total)}")
    y = _title(d, "Memory of a rank over a step", width)
    left, right, top, tall = 44.0, 10.0, y + 18, 200.0
    bottom = top + tall
    n, wide = len(moments), width - left - right
    unit, scale = ("GiB", GiB) if top_value > GiB else ("MiB", 2**20) if top_value > 2**20 else ("KiB", 1024)

    def px(i: float) -> float:
        return left + wide * i / n

    def py(value: float) -> float:
        return bottom - tall * value / (1.06 * top_value)

    for value in _ticks(top_value / scale):
        at = py(value * scale)
        d.line(((left, at), (left + wide, at)), "line", 0.7)
        d.write(left - 5, at + 4, f"{value:g}", size=11, fill="dim", anchor="end")
    d.write(8, top - 4, unit, size=11, fill="dim")
    below = [0] * n
    for kind, values in series.items():
        above = [a + b for a, b in zip(below, values)]
        if any(values):
            points = [(px(i + j), py(above[i])) for i in range(n) for j in (0, 1)]
            points += [(px(i + j), py(below[i])) for i in reversed(range(n)) for j in (1, 0)]
            d.area(_thin(points), kind, f"{kind}: at most {size(max(values))}")
        below = above
    d.line(((left, bottom), (left + wide, bottom)), "dim")
    if limit <= 1.06 * top_value:
        d.line(((left, py(limit)), (left + wide, py(limit))), "alarm", 1.5, "dashed")
        text = f"{found.hardware.name}: {size(limit)} for this"
        d.write(left + wide - 2, py(limit) - 4, fit(text, wide, 11), size=11, fill="alarm", anchor="end")
    at = moments.index(peak)
    d.line(((px(at + 0.5), py(peak.total)), (px(at + 0.5), py(peak.total) - 8)), "ink", 1.5)
    words = fit(f"peak {size(peak.total)}", wide, 11)
    anchor = "start" if at < n / 2 else "end"
    d.write(px(at + 0.5) + (3 if anchor == "start" else -3), py(peak.total) - 4, words, size=11, bold=True, anchor=anchor)
    y = bottom + 4
    for a, b, phase in _phases([m.name for m in moments]):
        d.line(((px(a) + 1, y + 2), (px(b) - 1, y + 2)), "dim", 2)
        if (px(b) - px(a)) > width_of(phase, 11):
            d.write((px(a) + px(b)) / 2, y + 17, phase, size=11, fill="dim", anchor="middle")
    d.height = legend(d, [(k, f"{k}") for k in reversed(series) if any(series[k])], y + 30, width)
    return d


def memory_at_peak(found: StepReport, width: float = WIDE) -> Drawing:
    """Bytes of each kind at the peak, as bars, and what a device has."""
    peak, limit = found.memory.peak, found.hardware.usable_bytes
    d = Drawing(width, label=f"Memory of a rank at the peak ({peak.name}), by kind: {size(peak.total)} of {size(limit)}")
    y = _title(d, f"Memory at the peak: {peak.name}", width)
    kinds = [k for k in kinds_of([peak]) if peak.kinds[k]]
    y = _stacked(
        d, [(k, peak.kinds[k], f"{k}: {size(peak.kinds[k])}") for k in kinds], 8, y + 14, width - 16, 26, max(limit, peak.total)
    )
    at = 8 + (width - 16) * limit / max(limit, peak.total)
    d.line(((at, y - 32), (at, y + 4)), "alarm", 2)
    words = f"{size(peak.total)} ({share(peak.total, limit)}) of {size(limit)} that {found.hardware.name} has for this"
    for line in wrap(words, width - 16, 11, 2):
        y += 15
        d.write(8, y, line, size=11, fill="ink" if peak.total <= limit else "alarm")
    rows = [(k, [(k, float(peak.kinds[k]), k)], f"{size(peak.kinds[k])}, {share(peak.kinds[k], peak.total)}") for k in kinds]
    d.height = _bars(d, sorted(rows, key=lambda r: -r[1][0][1]), y + 10, width)
    return d


def collectives(found: StepReport, width: float = WIDE) -> Drawing:
    """What the blocks send: bytes of each kind of collective in a block."""
    rows = sorted(block_collectives(found), key=lambda r: -r.bytes * r.each)
    d = Drawing(width, label="Collectives of a step in each block, by bytes")
    y = _title(d, "Collectives of a step, bytes in one block", width)
    if not rows:
        d.write(8, y + 20, "None: there is one rank on each axis.", fill="dim")
        d.height = y + 30
        return d
    shown = []
    for r in rows[:MOST_BARS]:
        many = f"{r.each} x " if r.each > 1 else ""
        name = f"{r.where}, {r.phase}: {many}{r.kind} over {r.axis}={r.ranks}"
        blocks = f" in each of {r.blocks}" if r.blocks > 1 else ""
        shown.append((name, [(r.axis, float(r.bytes * r.each), f"{name}: {size(r.bytes)}")], f"{size(r.bytes * r.each)}{blocks}"))
    y = _bars(d, shown, y + 8, width)
    if len(rows) > MOST_BARS:
        d.write(8, y + 12, f"and {len(rows) - MOST_BARS} smaller ones, which are in the table", size=11, fill="dim")
        y += 16
    axes = {"tp": "tensor-parallel axis", "dp": "data-parallel axis (FSDP2)"}
    d.height = legend(d, [(a, words) for a, words in axes.items() if any(r.axis == a for r in rows)], y + 8, width)
    return d


def time_of_step(found: StepReport, width: float = WIDE) -> Drawing:
    """Seconds of a step by part, with overlap and one after the other."""
    parts, t = time_parts(found), found.time
    d = Drawing(width, label=f"Time of a step by part: {seconds(t.step)}, without overlap {seconds(t.without_overlap)}")
    y = _title(d, "Time of a step", width) + 8
    longest = max(t.step, t.without_overlap)
    for name, i, total in (("with overlap", 2, t.step), ("one after the other", 3, t.without_overlap)):
        y += 16
        d.write(8, y, name, size=12)
        d.write(width - 8, y, seconds(total), size=12, bold=True, anchor="end")
        of = [(p[1], float(p[i]), f"{p[0]}: {seconds(p[i])}") for p in parts]  # type: ignore[arg-type]
        y = _stacked(d, of, 8, y + 6, width - 16, 24, longest) + 8
    d.height = legend(
        d, [(p[1], f"{p[0]}: {seconds(p[2])}" + (f" of {seconds(p[3])}" if p[3] > p[2] else "")) for p in parts], y + 4, width
    )
    return d


def roofline(found: StepReport, width: float = WIDE) -> Drawing:
    """The matrix products of a rank under the roof of the device: FLOPs for each byte moved, and FLOP/s."""
    points, hw = roofline_points(found), found.hardware
    d = Drawing(width, label=f"Matrix products under the roofline of {hw.name}: {len(points)} kinds")
    y = _title(d, "Matrix products under the roofline", width)
    left, right, top, tall = 52.0, 12.0, y + 22, 190.0
    bottom, wide = top + tall, width - left - right
    ridge = found.peak_flops / hw.memory_bandwidth
    xs = [p.intensity for p in points] + [ridge]
    ys = [p.flops_per_s for p in points] + [found.peak_flops]
    x0, x1 = math.floor(math.log10(min(xs)) * 2) / 2 - 0.2, math.ceil(math.log10(max(xs)) * 2) / 2 + 0.2
    y0, y1 = min(math.floor(math.log10(min(ys))), math.log10(found.peak_flops) - 1.2), math.log10(found.peak_flops) + 0.15

    def px(value: float) -> float:
        return left + wide * (math.log10(value) - x0) / (x1 - x0)

    def py(value: float) -> float:
        return bottom - tall * (math.log10(value) - y0) / (y1 - y0)

    for e in range(math.ceil(y0), math.floor(y1) + 1):
        d.line(((left, py(10**e)), (left + wide, py(10**e))), "line", 0.7)
        d.write(left - 5, py(10**e) + 4, f"{10 ** (e - 12):g}", size=11, fill="dim", anchor="end")
    for e in range(math.ceil(x0), math.floor(x1) + 1):
        d.line(((px(10**e), top), (px(10**e), bottom)), "line", 0.7)
        d.write(px(10**e), bottom + 14, f"{10**e:g}", size=11, fill="dim", anchor="middle")
    d.write(8, top - 6, "TFLOP/s", size=11, fill="dim")
    d.write(left + wide, bottom + 28, "FLOPs for each byte moved", size=11, fill="dim", anchor="end")
    low = max(10**x0, 10**y0 / hw.memory_bandwidth)
    d.line(
        ((px(low), py(low * hw.memory_bandwidth)), (px(ridge), py(found.peak_flops)), (left + wide, py(found.peak_flops))), "dim", 2
    )
    for p in points:
        name = {"forward": "parameters", "backward": "backward"}.get(p.phase, "tp")
        r = 4 if p.phase == "forward" else 6.5  # around those of the forward, which have the same place
        d.rect(px(p.intensity) - r, py(p.flops_per_s) - r, 2 * r, 2 * r, name if r == 4 else "", name, radius=r, text=p.words)
    words = [("parameters", "forward"), ("backward", "backward")] + [("tp", "run again")] * any(
        p.phase == "recompute" for p in points
    )
    d.height = legend(d, words, bottom + 34, width)
    return d


def bar_of(found: StepReport, width: float, most: float) -> Drawing:
    """The memory of one choice as a small bar, on a scale up to `most` bytes."""
    peak = found.memory.peak
    d = Drawing(width, 18, f"{size(peak.total)} at the peak")
    kinds = [k for k in kinds_of([peak]) if peak.kinds[k]]
    _stacked(d, [(k, peak.kinds[k], f"{k}: {size(peak.kinds[k])}") for k in kinds], 1, 2, width - 4, 14, most)
    at = 1 + (width - 4) * found.hardware.usable_bytes / most
    d.line(((at, 0), (at, 18)), "alarm", 2)
    return d


def all_of(found: StepReport, width: float = WIDE) -> list[Drawing]:
    """All plots."""
    return [f(found, width) for f in (memory_over_step, memory_at_peak, collectives, time_of_step)]


# ------------------------------------------------------------------------------------------------------------------ parts


def _title(d: Drawing, text: str, width: float) -> float:
    y = 4.0
    for line in wrap(text, width - 16, 14 * BOLD, 2):
        y += 16
        d.write(8, y, line, size=14, bold=True)
    return y


def _stacked(
    d: Drawing, parts: Sequence[tuple[str, float, str]], x: float, y: float, width: float, tall: float, most: float
) -> float:
    d.rect(x, y, width, tall, "card")
    for name, value, tip in parts:
        wide = width * value / most
        d.rect(x, y, max(wide, 0.4 if value else 0), tall, name, text=tip)
        x += wide
    return y + tall


def _bars(d: Drawing, rows: Sequence[tuple[str, list[tuple[str, float, str]], str]], y: float, width: float) -> float:
    """A bar for each row; on a narrow page its name above it."""
    most = max((sum(v for _, v, _ in parts) for _, parts, _ in rows), default=1) or 1
    value_wide = max(width_of(words, 11) for *_, words in rows) + 10
    above = width <= NARROW + 60
    name_wide = 0.0 if above else min(max(width_of(name, 12) for name, *_ in rows) + 12, 0.58 * width)
    for name, parts, words in rows:
        if above:
            for line in wrap(name, width - 16, 12, 2):
                y += 15
                d.write(8, y, line)
            y += 4
        room = width - 16 - name_wide - value_wide
        if not above:
            d.write(8, y + 12, fit(name, name_wide - 8, 12))
        end = 8 + name_wide + room * sum(v for _, v, _ in parts) / most
        at = 8 + name_wide
        for fill, value, tip in parts:
            d.rect(at, y + 2, max(1.0, room * value / most), 13, fill, text=tip)
            at += room * value / most
        d.write(max(end, at) + 6, y + 12, words, size=11, fill="dim")
        y += 19
    return y + 4


def legend(d: Drawing, names: Sequence[tuple[str, str]], y: float, width: float) -> float:
    """What the colors mean; returns where it ends."""
    x = 8.0
    for fill, words in names:
        text = fit(words, width - 40, 11)
        wide = 18 + width_of(text, 11) + 14
        if x + wide > width and x > 8:
            x, y = 8, y + 18
        d.rect(x, y, 12, 12, fill, radius=2)
        d.write(x + 17, y + 10, text, size=11)
        x += wide
    return y + 20


def _ticks(most: float) -> list[float]:
    for step in (s * 10**e for e in range(-3, 7) for s in (1, 2, 5)):
        if most / step <= 5:
            return [i * step for i in range(int(most / step) + 1)]
    return [0.0]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Without the points in the middle of a straight line."""
    found: list[tuple[float, float]] = []
    for p in points:
        if len(found) > 1 and abs(found[-1][1] - p[1]) < 0.05 and abs(found[-2][1] - p[1]) < 0.05:
            found[-1] = p
        else:
            found.append(p)
    return found


def _phases(names: Sequence[str]) -> list[tuple[int, int, str]]:
    """(from, to, word) of the parts of a step."""
    found: list[tuple[int, int, str]] = []
    for i, name in enumerate(names):
        word = "forward" if name.startswith("forward") else "optimizer" if name.startswith("step") else "backward"
        if found and found[-1][2] == word:
            found[-1] = (found[-1][0], i + 1, word)
        else:
            found.append((i, i + 1, word))
    return found
