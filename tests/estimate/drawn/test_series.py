from __future__ import annotations

import dataclasses

import pytest

from lightning_tp.estimate import Estimate
from lightning_tp.estimate.cost.memory import MemorySnapshot
from lightning_tp.estimate.drawn.series import (
    KINDS,
    Stretch,
    block_collectives,
    color_of,
    memory_series,
    roofline_points,
    stretches,
    time_parts,
)


def with_timeline(found: Estimate, *moments: tuple[str, int]) -> Estimate:
    timeline = tuple(MemorySnapshot(name, {"MLP": n}) for name, n in moments)
    return dataclasses.replace(found, memory=dataclasses.replace(found.memory, timeline=timeline))


def test_what_is_drawn_are_the_numbers_of_the_estimate(found: Estimate) -> None:
    series, moments = memory_series(found), found.memory.timeline
    for i, moment in enumerate(moments):
        assert {k: v[i] for k, v in series.items() if v[i]} == {k: n for k, n in moment.kinds.items() if n}
    lines = stretches(found)
    assert [i for s in lines for i in range(s.first, s.last + 1)] == list(range(len(moments)))
    assert max(s.most for s in lines) == found.memory.peak.total
    assert any(s.name == "forward of layers.{0-4}" for s in lines)

    sent = block_collectives(found)
    assert sum(r.total for r in sent) == sum(c.bytes * c.count for c in found.collectives)
    assert sum(r.each * r.blocks for r in sent) == sum(c.count for c in found.collectives)
    assert any(r.blocks == 5 and r.where == "layers.{0-4}" and r.axis == "dp" for r in sent)

    parts = time_parts(found)
    assert sum(p.exposed for p in parts) == pytest.approx(found.time.step)
    assert sum(p.total for p in parts) == pytest.approx(found.time.without_overlap)
    assert {p.name for p in parts} >= {"matmuls (GEMMs)", "TP communication", "FSDP2 communication"}


def test_kinds_are_stacked_in_one_order_and_have_colors(found: Estimate) -> None:
    kinds = list(memory_series(found))
    assert kinds == sorted(kinds, key=list(KINDS).index) and len(set(KINDS.values())) == len(KINDS)
    assert color_of("MLP") == KINDS["MLP"] and color_of("a new kind") not in KINDS.values()


def test_what_takes_turns_is_one_stretch(found: Estimate) -> None:
    names = ["forward of layers.0", "forward of layers.1", "loss"]
    names += [name for i in (2, 1, 0) for name in (f"backward of layers.{i}", f"gradients of layers.{i} are summed")]
    lines = stretches(with_timeline(found, *((name, 10 * i) for i, name in enumerate(names)), ("step", 5)))
    assert lines == [
        Stretch("forward of layers.{0-1}", 0, 1, 0, 10, 10),
        Stretch("loss", 2, 2, 20, 20, 20),
        Stretch("backward of layers.{0-2} / gradients of layers.{0-2} are summed", 3, 8, 30, 80, 80),
        Stretch("step", 9, 9, 5, 5, 5),
    ]


def test_one_turn_is_none(found: Estimate) -> None:
    lines = stretches(with_timeline(found, ("backward of a.1", 4), ("sum of a.1", 3), ("backward of a.0", 2)))
    assert [s.name for s in lines] == ["backward of a.1", "sum of a.1", "backward of a.0"]


def test_no_matmul_is_over_the_roof(found: Estimate) -> None:
    points, hw = roofline_points(found), found.hardware
    assert len(points) == sum(1 for p in found.products if p.kind == "product")
    for p in points:
        assert 0 < p.flops_per_s <= min(found.peak_flops, p.intensity * hw.memory_bandwidth)
    products = [p for p in found.products if p.kind == "product"]
    taken = sum(p.flops / q.flops_per_s for p, q in zip(products, points, strict=True))
    assert taken * found.accumulate == pytest.approx(found.time.products)
