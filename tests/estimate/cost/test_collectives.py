"""The collectives of a step, counted by hand."""

from __future__ import annotations

from typing import Any

import torch

from lightning_tp.core.comm.state import R, S
from lightning_tp.estimate.cost.collectives import FINITE, NORM, OUTSIDE, PARTIAL, Collective, collectives_of
from lightning_tp.estimate.rank.rank_model import LocalParam
from lightning_tp.estimate.rank.settings import PRECISIONS
from lightning_tp.estimate.trace.step_trace import CollectiveCall, Tape
from lightning_tp.styles import Split
from tests.estimate.by_hand import DP, GATHERED, block_tape, model_of, outside, step

FP32 = PRECISIONS["32-true"]


def counts(tapes: list[Tape], tp: int, dp: int, precision: Any = FP32, **options: Any) -> dict[tuple[Any, ...], int]:
    followed = options.pop("followed", None)
    params = options.pop("params", None)
    model = model_of(tapes, followed, **({"params": params} if params else {}))
    return {
        (c.kind, c.axis, c.ranks, c.bytes, c.where, c.phase): c.count for c in collectives_of(model, precision, tp, dp, **options)
    }


def test_of_fsdp() -> None:
    found = counts(step(), 1, DP, clip=False, accumulate=3)
    expected = {
        ("all-gather", "dp", DP, GATHERED[""], OUTSIDE, "forward"): 3,
        ("reduce-scatter", "dp", DP, GATHERED[""], OUTSIDE, "backward"): 1,
    }
    for i in range(3):
        block, size = f"layers.{i}", GATHERED[f"layers.{i}"]
        expected |= {("all-gather", "dp", DP, size, block, phase): 3 for phase in ("forward", "backward")}
        expected["reduce-scatter", "dp", DP, size, block, "backward"] = 1
    assert found == expected


def test_of_the_trace() -> None:
    call = CollectiveCall("all-reduce", 64, "layers.1.down", "forward")
    gap = CollectiveCall("all-gather", 32, "", "forward")
    tapes = [
        outside("forward"),
        block_tape("layers.0", "forward"),
        block_tape("layers.1", "forward", [call, call, gap]),
        block_tape("layers.2", "forward", representative="layers.1"),
        outside("forward", gap, duplicate=True),  # counted with the representative
    ]
    found = counts(
        tapes, 4, 1, clip=False, accumulate=2, followed={"layers.0": "layers.0", "layers.1": "layers.1", "layers.2": "layers.1"}
    )
    assert found == {
        (call.kind, "tp", 4, 64, "layers.1", "forward"): 4,
        (call.kind, "tp", 4, 64, "layers.2", "forward"): 4,
        (gap.kind, "tp", 4, 32, "layers.1", "forward"): 2,
        (gap.kind, "tp", 4, 32, "layers.2", "forward"): 2,
    }


def test_once_per_step() -> None:
    found = collectives_of(model_of(step()), PRECISIONS["16-mixed"], 2, DP, accumulate=5)
    once = [c for c in found if c.phase == "step"]
    assert once == [Collective("all-reduce", axis, 2, 4, 1, where, "step") for where in (FINITE, NORM) for axis in ("tp", "dp")]
    assert not [c for c in collectives_of(model_of(step()), FP32, 2, DP, clip=False) if c.phase == "step"]


def test_partial_gradients_are_summed() -> None:
    """A norm on sequence shards, and a fused weight of four ranks of which two each share the last rows; FSDP2 shards rows of dim 0."""

    def param(name: str, tp_shape: tuple[int, ...], split: Split) -> LocalParam:
        return LocalParam(name, (8, *tp_shape[1:]), tp_shape, -(-tp_shape[0] // DP), split, "", torch.float32, True)

    own_and_shared = tuple(
        ((rank, rank + 1), (4 + 2 * (rank // 2), 6 + 2 * (rank // 2))) for rank in range(4)
    )  # 1 row of its own, 2 shared
    params = (
        param("head", (10,), Split(R)),
        param("layers.0.w", (3, 7), Split(S(0), own_and_shared)),
        param("layers.1.w", (10, 3), Split()),
    )
    sums = {}
    for dp in (1, DP):
        found = counts(step(), 4, dp, clip=False, params=params)
        sums[dp] = {key[2:4]: n for key, n in found.items() if key[4] == PARTIAL}
    assert sums[1] == {(4, 10 * 4): 1, (2, 2 * 7 * 4): 1}
    assert sums[DP] == {(4, 5 * 4): 1, (2, 1 * 7 * 4): 1}  # on the first data-parallel rank: of three rows the first two
    assert not any(key[4] == PARTIAL for key in counts(step(), 1, 1, params=params))
