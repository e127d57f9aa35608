from __future__ import annotations

import dataclasses
import itertools
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from lightning_tp import TPError
from lightning_tp.core.units import size
from lightning_tp.estimate import Estimate
from lightning_tp.estimate.drawn import charts
from lightning_tp.estimate.drawn.figure import ALARM, NARROW, WIDE, figure_of
from lightning_tp.estimate.drawn.series import PHASES, block_collectives, color_of, kinds_of, roofline_points, time_parts

ALL = (charts.memory_over_step, charts.memory_at_peak, charts.collectives, charts.time_of_step, charts.roofline)


def axes_of(chart: Any, found: Estimate, width: float = WIDE) -> Any:
    return figure_of([chart(found, width)], width).axes[0]


def bars(axes: Any) -> list[list[tuple[float, float, str]]]:
    """(left, width, color) of the pieces of each bar."""
    from matplotlib.colors import to_hex

    return [[(p.get_x(), p.get_width(), to_hex(p.get_facecolor())) for p in bar] for bar in axes.containers]


def with_memory_of(found: Estimate, bytes_: float) -> Estimate:
    return dataclasses.replace(found, hardware=dataclasses.replace(found.hardware, memory_bytes=bytes_, reserved_bytes=0))


def test_memory_over_the_step_is_stacked_on_the_smallest(found: Estimate) -> None:
    axes = axes_of(charts.memory_over_step, found)
    stack, moments = axes.patches, found.memory.timeline
    scale = 2**20 if found.memory.peak.total > 2**20 else 2**10
    assert stack[0].get_data().values == pytest.approx([m.total / scale for m in moments])
    assert stack[0].get_data().edges == pytest.approx(range(len(moments) + 1))
    for above, below in itertools.pairwise(stack):  # what is between two tops is the upper one's
        kind = above.get_label()
        mine = [a - b for a, b in zip(above.get_data().values, below.get_data().values)]
        assert mine == pytest.approx([m.kinds.get(kind, 0) / scale for m in moments], abs=1e-6)
    most = {k: max(m.kinds.get(k, 0) for m in moments) / found.memory.peak.total for m in moments for k in m.kinds}
    small = [k for k, part in most.items() if 0 < part < charts.VISIBLE]
    assert [p.get_label() for p in stack if p.get_label() in most] == [k for k in reversed(kinds_of(moments)) if k not in small]
    assert stack[-1].get_label() == f"{len(small)} smaller kinds" and len(stack) - 1 == len(kinds_of(moments)) - len(small)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["forward", "backward"]
    assert f"peak {size(found.memory.peak.total)}" in [t.get_text() for t in axes.texts]


def test_what_a_device_has_is_drawn_if_it_is_near(found: Estimate) -> None:
    def lines(bytes_: float) -> list[float]:
        axes = axes_of(charts.memory_over_step, with_memory_of(found, bytes_))
        return [line.get_ydata()[0] for line in axes.lines if line.get_color() == ALARM]

    most = found.memory.peak.total
    assert len(lines(2 * most)) == 1 and len(lines(0.5 * most)) == 1 and lines(4 * most) == []


def test_memory_at_the_peak(found: Estimate) -> None:
    peak = found.memory.peak
    limit = with_memory_of(found, 2 * peak.total).hardware.usable_bytes
    axes = axes_of(charts.memory_at_peak, with_memory_of(found, 2 * peak.total))
    total, *rest = bars(axes)
    assert [width for _, width, _ in total] == [peak.kinds[k] for k in kinds_of([peak])]
    assert all(a[0] + a[1] == pytest.approx(b[0]) for a, b in itertools.pairwise(total))
    large = sorted((n for n in peak.kinds.values() if n >= 0.005 * peak.total), reverse=True)
    assert [bar[0][1] for bar in rest if bar] == large
    assert {color for _, _, color in total} == {color_of(k) for k, n in peak.kinds.items() if n}
    assert axes.collections[0].get_segments()[0][0][0] == pytest.approx(limit)
    small = axes_of(charts.memory_at_peak, with_memory_of(found, 0.5 * peak.total))
    assert small.collections[0].get_segments()[0][0][0] == pytest.approx(0.25 * limit)
    others = peak.total - sum(large)
    assert f"all others: {size(others)}" in [t.get_text() for t in axes.texts]


def test_collectives(found: Estimate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "MOST_BARS", 5)
    largest = sorted((r.bytes * r.each for r in block_collectives(found)), reverse=True)
    axes = axes_of(charts.collectives, found)
    assert [bar[0][1] for bar in bars(axes) if bar] == largest[:5]
    assert f"and {len(largest) - 5} more of at most {size(largest[5])}" in [t.get_text() for t in axes.texts]
    assert {t.get_text() for t in axes.get_legend().get_texts()} == {"tensor-parallel group", "data-parallel group (FSDP2)"}
    alone = axes_of(charts.collectives, dataclasses.replace(found, collectives=()))
    assert [t.get_text() for t in alone.texts] == ["none: there is one rank on each axis"]


def test_time_of_a_step(found: Estimate) -> None:
    axes, parts = axes_of(charts.time_of_step, found), time_parts(found)
    exposed, total = bars(axes)
    assert [(width, color) for _, width, color in exposed] == [(p.exposed, p.color) for p in parts]
    assert [width for _, width, _ in total] == [p.total for p in parts]
    assert exposed[-1][0] + exposed[-1][1] == pytest.approx(found.time.step)
    words = [t.get_text() for t in axes.get_legend().get_texts()]
    hidden = [p.name for p in parts if p.total > p.exposed]
    assert hidden and [w.partition(":")[0] for w in words if " exposed of " in w] == hidden


def test_roofline(found: Estimate) -> None:
    axes, points = axes_of(charts.roofline, found), roofline_points(found)
    drawn = sorted((x, y) for scatter in axes.collections for x, y in scatter.get_offsets())
    wanted = sorted((p.intensity, p.flops_per_s / 1e12) for p in points)
    assert [n for point in drawn for n in point] == pytest.approx([n for point in wanted for n in point])
    (low, y), (ridge, peak), _ = zip(*axes.lines[0].get_data())
    assert peak == pytest.approx(found.peak_flops / 1e12)
    assert y / low == pytest.approx(peak / ridge) == pytest.approx(found.hardware.memory_bandwidth / 1e12)
    assert [t.get_text() for t in axes.get_legend().get_texts()] == [p for p in PHASES if any(q.phase == p for q in points)]


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("chart", ALL)
def test_nothing_is_drawn_over_the_edge(chart: Any, width: float, found: Estimate) -> None:
    for of in (found, dataclasses.replace(found, collectives=())):
        figure = figure_of([chart(of, width)], width)
        figure.draw_without_rendering()
        box, height = figure.axes[0].get_tightbbox(), figure.get_figheight()
        assert box.x0 >= 0 and box.x1 <= 100 * width and box.y0 >= 0 and box.y1 <= 100 * height


def test_rows_of_bars_do_not_overlap(found: Estimate) -> None:
    axes = axes_of(charts.collectives, found, NARROW)
    axes.figure.draw_without_rendering()
    boxes = [t.get_window_extent() for t in axes.texts]
    for text, below, bar in zip(boxes, boxes[1:], axes.containers):
        middle = bar[0].get_window_extent()
        assert below.y1 <= middle.y0 + 1 and middle.y1 <= text.y0 + 1


def test_plot_writes_four_charts(found: Estimate, tmp_path: Path) -> None:
    found.plot(tmp_path / "found.svg")
    words = " ".join(e.text or "" for e in ET.parse(tmp_path / "found.svg").iter("{http://www.w3.org/2000/svg}text"))
    for title in ("Memory of a rank over a step", "Memory at the peak", "Collectives of a step", "Time of a step"):
        assert title in words
    with pytest.raises(TPError, match=r"\.svg, \.png, \.pdf"):
        found.plot(tmp_path / "found.gif")
