from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from lightning_tp import TPError, shapes
from lightning_tp.estimate.drawn.figure import new_figure
from lightning_tp.estimate.drawn.matmul_chart import line_style, matmul_rates, plot_study, step_rates
from lightning_tp.estimate.report.matmul import Shapes, StudyPoint
from tests.estimate.models import MODELS


@cache
def study() -> Shapes:
    build, inputs, loss = MODELS["llama"]()
    return shapes(build(), inputs, gpus=4, local_batches=(0.5, 1.0, 2.0), tps=(1, 2), loss_fn=loss)


def test_a_line_for_each_tp_and_hollow_markers_for_what_is_not_possible() -> None:
    found = study()
    left, right = new_figure((9, 4)).subplots(1, 2)
    matmul_rates(left, found)
    lines = {line.get_label(): line for line in left.lines}
    for tp in (1, 2):
        cells = [c for c in found.cells if c.tp == tp]
        x, y = lines[f"tp={tp}"].get_data()
        assert list(x) == [c.local_batch for c in cells] and list(y) == [c.flop_s / 1e12 for c in cells]
    split = [c for c in found.cells if not c.possible]
    hollow = [line for line in left.lines if line.get_markerfacecolor() == "white"]
    assert split and [x for line in hollow for x in line.get_xdata()] == [c.local_batch for c in split]
    assert "hollow: only with split sequences" in lines

    step_rates(right, found)
    of_one = [c.estimate.tokens_per_s_per_device for c in found.cells if c.tp == 1 and c.estimate is not None]
    assert list(right.lines[0].get_ydata()) == of_one and "tokens/s per device" in right.get_ylabel()
    assert right.get_ylim()[1] > max(of_one) and right.get_ylim()[0] == 0


def test_hollow_markers_for_what_does_not_fit_in_memory() -> None:
    def with_memory(point: StudyPoint, bytes_: float) -> StudyPoint:
        e = point.estimate
        return point if e is None else replace(point, estimate=replace(e, hardware=replace(e.hardware, memory_bytes=bytes_)))

    found = replace(study(), cells=tuple(with_memory(c, 1.0 if c.local_batch > 1 else 1e12) for c in study().cells))
    axes = new_figure((9, 4)).subplots()
    step_rates(axes, found)
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert [list(line.get_xdata()) for line in hollow] == [[2.0], [2.0]] and "hollow: does not fit" in axes.get_ylabel()
    assert all(len(line.get_xdata()) > 1 for line in axes.lines if line not in hollow)


def test_lines_differ_in_color_and_marker() -> None:
    styles = [line_style(i) for i in range(7)]
    assert len({s["color"] for s in styles}) == len({s["marker"] for s in styles}) == 7 and line_style(7) == styles[0]


def test_plot_study(tmp_path: Path) -> None:
    plot_study(study(), tmp_path / "tp.svg")
    text = (tmp_path / "tp.svg").read_text()
    assert f"{study().model}, " in text and f"samples of {study().seq:,} tokens" in text and ">tp=2<" in text
    with pytest.raises(TPError, match=r"\.svg, \.png, \.pdf"):
        plot_study(study(), tmp_path / "tp.gif")
