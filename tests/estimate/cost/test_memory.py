"""The memory of three blocks, counted by hand: what FSDP2 gathers, prefetches and reduces, and when."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_tp.estimate.cost.memory import Memory, MemorySnapshot, memory_of
from lightning_tp.estimate.rank.settings import PRECISIONS
from tests.estimate.by_hand import DP, GATHERED, PEAK, ROWS, SAVED, model_of, step

FP32 = PRECISIONS["32-true"]
HELD = 4 * sum(ROWS.values())  # bytes of parameters, and of gradients


def memory(dp: int = DP, accumulate: int = 1) -> Memory:
    return memory_of(model_of(step()), FP32, dp, optimizer=1000, scratch=50, accumulate=accumulate)


def at(found: Memory, name: str) -> dict[str, int]:
    return dict(next(m for m in found.timeline if m.name == name).kinds)


def test_what_lasts_is_there_at_every_moment() -> None:
    found = memory()
    assert (found.parameters, found.gradients, found.optimizer, found.buffers) == (HELD, HELD, 1000, 3)
    assert all((m.kinds["parameters"], m.kinds["optimizer"], m.kinds["buffers"]) == (HELD, 1000, 3) for m in found.timeline)
    assert found.activations == {"residual": 3 * SAVED}
    assert found.peak == max(found.timeline, key=lambda m: m.total)


def test_the_order_of_moments() -> None:
    backward = [m for i in (2, 1, 0) for m in (f"backward of layers.{i}", f"gradient reduction of layers.{i}")]
    assert [m.name for m in memory().timeline] == [
        "forward pass, outside the blocks",
        *(f"forward of layers.{i}" for i in range(3)),
        "forward pass, outside the blocks",
        "backward pass, outside the blocks",
        *backward,
        "backward pass, outside the blocks",
        "gradient reduction, outside the blocks",
        "step of the optimizer",
    ]


def test_parameters_are_unsharded_where_they_are_used() -> None:
    found = memory()
    for name in ("forward of layers.1", "backward of layers.1"):
        assert at(found, name)["gathered parameters"] == GATHERED[""] + GATHERED["layers.1"]
    assert at(found, "gradient reduction of layers.1")["gathered parameters"] == GATHERED[""]
    assert at(found, "backward pass, outside the blocks")["gathered parameters"] == GATHERED[""]
    for name in ("gradient reduction, outside the blocks", "step of the optimizer"):
        assert "gathered parameters" not in at(found, name)


def test_fsdp2_prefetches_the_next_unit_and_reduces_the_one_before() -> None:
    found = memory()
    expected = {
        "forward of layers.0": GATHERED["layers.0"],
        "forward of layers.1": GATHERED["layers.1"],
        "forward of layers.2": GATHERED["layers.2"],
        "backward of layers.2": GATHERED["layers.1"],
        "gradient reduction of layers.2": GATHERED["layers.1"] + GATHERED["layers.2"],
        "backward of layers.1": GATHERED["layers.0"] + GATHERED["layers.2"],
        "gradient reduction of layers.1": GATHERED["layers.0"] + GATHERED["layers.1"],
        "backward of layers.0": GATHERED["layers.1"],
        "gradient reduction of layers.0": GATHERED["layers.0"],
        "gradient reduction, outside the blocks": GATHERED["layers.0"] + GATHERED[""],
    }
    assert {m.name: m.kinds["FSDP2 buffers"] for m in found.timeline if "FSDP2 buffers" in m.kinds} == expected


def test_gradients_are_sharded_as_they_are_reduced() -> None:
    found = memory()
    shards = {unit: 4 * rows for unit, rows in ROWS.items()}
    assert "gradients" not in at(found, "backward of layers.2")
    assert at(found, "gradient reduction of layers.2")["gradients"] == shards["layers.2"]
    assert at(found, "backward of layers.0")["gradients"] == shards["layers.2"] + shards["layers.1"]
    assert at(found, "backward of layers.0")["unsharded gradients"] == GATHERED["layers.0"] + GATHERED[""]
    assert at(found, "gradient reduction, outside the blocks")["gradients"] == HELD
    assert at(found, "step of the optimizer") == {
        "parameters": HELD, "gradients": HELD, "optimizer": 1000, "buffers": 3, "optimizer's scratch": 50,
    }  # fmt: skip


def test_accumulated_gradients_stay_unsharded_until_their_reduction() -> None:
    found = memory(accumulate=2)
    everything = sum(GATHERED.values())
    assert at(found, "forward of layers.0")["unsharded gradients"] == everything
    # beside those of earlier micro-batches: the root's, and the block's own
    before = everything - GATHERED["layers.2"]
    assert at(found, "backward of layers.1")["unsharded gradients"] == before + GATHERED[""] + GATHERED["layers.1"]
    assert at(found, "gradient reduction, outside the blocks")["unsharded gradients"] == GATHERED[""]
    assert "unsharded gradients" not in at(found, "step of the optimizer")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_without_data_parallel_ranks(accumulate: int) -> None:
    params = model_of(step()).params
    whole = model_of(step(), params=tuple(replace(p, rows=p.rows * DP) for p in params))
    found = memory_of(whole, FP32, 1, optimizer=0, scratch=0, accumulate=accumulate)
    gradients = 2 * HELD
    assert not any("FSDP2" in kind or "gathered" in kind for m in found.timeline for kind in m.kinds)
    if accumulate == 2:  # all are there from the micro-batch before
        assert all(m.kinds["gradients"] == gradients for m in found.timeline)
    else:
        assert at(found, "backward of layers.1")["gradients"] == GATHERED[""] + GATHERED["layers.2"] + GATHERED["layers.1"]
        assert at(found, "step of the optimizer")["gradients"] == gradients


def test_activations_at_their_peak() -> None:
    found = memory()
    assert at(found, "forward of layers.1")["residual"] == 2 * SAVED
    assert at(found, "forward of layers.1")["backward"] == PEAK
    assert at(found, "backward of layers.1")["residual"] == 2 * SAVED
    assert at(found, "gradient reduction of layers.1")["residual"] == SAVED and "backward" not in at(
        found, "gradient reduction of layers.1"
    )


def test_total() -> None:
    assert MemorySnapshot("now", {"a": 1, "b": 2}).total == 3
