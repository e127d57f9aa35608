"""How the parts of a step add up, and what communication hides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lightning_tp.core.units import seconds
from lightning_tp.estimate.cost.collectives import NORM, Collective
from lightning_tp.estimate.cost.hardware import hardware
from lightning_tp.estimate.cost.roofline import collective_seconds, kernel_seconds
from lightning_tp.estimate.cost.step_time import Time, time_of
from lightning_tp.estimate.predict import predict
from lightning_tp.estimate.rank.inputs import loss_of
from lightning_tp.estimate.rank.settings import Options
from lightning_tp.estimate.rank.trace_cache import TraceCache
from lightning_tp.estimate.trace.step_trace import CollectiveCall, FusedOp
from tests.estimate.by_hand import DP, block_tape, model_of, op, outside
from tests.estimate.models import MODELS

H100 = replace(hardware("h100"), host_s=0.0)


@pytest.fixture(scope="module")
def traced() -> tuple[TraceCache, Any]:
    """Traced once for all that follows: meshes of 1 x 1, 1 x 2, 16 x 1, 4 x 2."""
    build, inputs, loss = MODELS["llama"]()
    return TraceCache(build(), inputs, loss_of(loss)), inputs


@pytest.mark.parametrize("device", ["h100", "cpu"])  # with kernels that wait for the host, and without
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("mesh", [(1, 1), (1, 2), (16, 1), (4, 2)])
def test_the_parts_of_a_step_add_up_to_it(
    traced: tuple[TraceCache, Any], mesh: tuple[int, int], accumulate: int, device: str
) -> None:
    found = predict(*traced, *mesh, device, Options(accumulate=accumulate))
    t = found.time
    parts = [getattr(t, n) for n in ("products", "attention", "other", "tp", "slowed", "host", "optimizer")]
    assert all(seconds >= 0 for seconds in parts)
    assert sum(parts) + t.dp_exposed == pytest.approx(t.step, rel=1e-9)
    assert sum(parts) + t.dp == pytest.approx(t.without_overlap, rel=1e-9)
    assert (t.slowed > 0) == (mesh[0] > 1) and (t.tp > 0) == (mesh[1] > 1) and t.dp_exposed <= t.dp
    assert ("kernels slowed by FSDP2 communication", seconds(t.slowed)) in found.tables()[-1][2]
    lighter = predict(*traced, *mesh, replace(hardware(device), fsdp_traffic=1.0), Options(accumulate=accumulate)).time
    assert lighter.slowed == pytest.approx(t.slowed / hardware(device).fsdp_traffic)


ADD = op("add", bytes=10**8)
CALL = CollectiveCall("all-reduce", 10**8, "layers.0", "forward")
TAPES = [
    outside("forward", ADD),
    block_tape("layers.0", "forward", [ADD, ADD, FusedOp(ADD), CALL]),
    block_tape("layers.1", "forward", [ADD]),
    block_tape("layers.2", "forward", representative="layers.1"),
    outside("forward", ADD, duplicate=True),
]
FOLLOWED = {"layers.0": "layers.0", "layers.1": "layers.1", "layers.2": "layers.1"}


def timed(*collectives: Collective, hw: Any = H100, **options: Any) -> Time:
    return time_of(model_of(TAPES, FOLLOWED), collectives, hw, 2, **({"optimizer_bytes": 0} | options))


def gather(where: str, size: int, count: int = 1) -> Collective:
    return Collective("all-gather", "dp", DP, size, count, where, "forward")


def test_kernels_of_all_blocks_count_and_duplicates_do_not() -> None:
    one = kernel_seconds(H100, ADD)
    tp = collective_seconds(H100, "all-reduce", 10**8, 2, 2)
    found = timed(accumulate=3)
    assert found.other == pytest.approx(3 * (1 + 2 + 1 + 1) * one) and found.tp == pytest.approx(3 * tp)
    assert found.step == found.without_overlap == pytest.approx(found.other + found.tp)
    assert timed(compile=True).other == pytest.approx((1 + 1 + 0 + 0) * one)  # blocks only; two of them fuse to nothing


def test_fsdp_is_hidden_behind_the_kernels_beside_it() -> None:
    small, large = 10**4, 10**11
    hidden = timed(gather("layers.1", small))
    assert hidden.dp > 0 and hidden.dp_exposed == 0 and hidden.slowed > 0
    assert hidden.step == pytest.approx(timed().step + hidden.slowed)
    exposed = timed(gather("layers.1", large))
    busy = kernel_seconds(H100, ADD) + exposed.slowed
    assert exposed.dp_exposed == pytest.approx(exposed.dp - busy)
    first = timed(gather("layers.0", small))  # nothing runs before the first block
    assert first.dp_exposed == pytest.approx(first.dp)
    outside_ = timed(gather("outside the blocks", small))
    assert outside_.dp_exposed == pytest.approx(outside_.dp) and outside_.slowed == 0


def test_what_happens_once_per_step() -> None:
    norm = Collective("all-reduce", "tp", 2, 4, 1, NORM, "step")
    inside = Collective("all-reduce", "tp", 2, 10**8, 1, "layers.0", "forward")  # in the trace already
    found = timed(norm, inside, accumulate=3, optimizer_bytes=10**9)
    bandwidth = H100.memory_bandwidth * H100.memory_efficiency * H100.sustained
    assert found.optimizer == pytest.approx(10**9 / bandwidth)
    assert found.tp - timed(accumulate=3).tp == pytest.approx(collective_seconds(H100, "all-reduce", 4, 2, 2))


def test_launching_takes_longer_than_small_kernels() -> None:
    slow = replace(H100, host_s=1.0)
    found = timed(hw=slow)
    assert found.step == pytest.approx(1 + 3 + 1 + 1)  # one second per launch, the collective's too
    assert found.host == pytest.approx(found.step - found.other - found.tp)
    cpu = timed(hw=replace(slow, device="cpu"))
    assert cpu.host == pytest.approx(6)  # nothing runs beside its own launches


def test_plus() -> None:
    assert Time(step=1.0, dp=2.0).plus(Time(step=3.0, tp=1.0), 2) == Time(step=7.0, dp=2.0, tp=2.0)
