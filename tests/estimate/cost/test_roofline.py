from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_tp.core.units import seconds
from lightning_tp.estimate.cost.gemm_tiling import START
from lightning_tp.estimate.cost.hardware import hardware
from lightning_tp.estimate.cost.roofline import collective_seconds, in_node, product_seconds
from lightning_tp.estimate.options import Options
from lightning_tp.estimate.predict import predict
from lightning_tp.estimate.rank.inputs import loss_of
from lightning_tp.estimate.rank.trace_cache import TraceCache
from tests.estimate.models import MODELS

H100 = hardware("h100")
GIB = 2**30


def test_large_messages_take_bandwidth_and_small_ones_latency() -> None:
    alone = collective_seconds(H100, "all-gather", 8 * GIB, 8, 8)
    assert alone == pytest.approx(8 * GIB * 7 / 8 / (450e9 * 0.8), rel=0.01)
    assert collective_seconds(H100, "all-reduce", 8 * GIB, 8, 8) == pytest.approx(2 * alone, rel=0.01)
    between = collective_seconds(H100, "all-gather", 8 * GIB, 2, 1)
    assert between == pytest.approx(8 * GIB / 2 / (50e9 * 0.8), rel=0.01)
    assert collective_seconds(H100, "all-gather", 1, 1, 1) == 0


def test_the_latency_of_a_ring_grows_with_its_ranks() -> None:
    small = [collective_seconds(H100, "all-gather", 2**20, n, 8) for n in (64, 512, 4096)]
    assert 6 < small[1] / small[0] < 9 and 6 < small[2] / small[1] < 9
    tree = [collective_seconds(H100, "all-reduce", 4, n, 8) for n in (64, 4096)]
    assert tree[1] < 3 * tree[0]  # logarithmic


def test_ranks_of_a_node_use_its_ports_together() -> None:
    assert in_node(H100, "dp", 1, 2048) == 8 and in_node(H100, "dp", 8, 256) == 1 and in_node(H100, "dp", 2, 4) == 4
    assert in_node(H100, "tp", 16, 16) == 8
    one, eight = (collective_seconds(H100, "all-gather", 8 * GIB, 64, n) for n in (1, 8))
    assert eight < one / 6


def test_products() -> None:
    full = product_seconds(H100, 1, 8192, 8192, 8192, torch.bfloat16, 3 * 8192 * 8192 * 2)
    assert 0.6 < 2 * 8192**3 / full / 989e12 <= 0.7
    narrow = product_seconds(H100, 1, 8192, 16, 8192, torch.bfloat16, 8192 * 8192 * 2)
    assert narrow >= 8192 * 8192 * 2 / (3350e9 * 0.85)  # bound by memory
    assert product_seconds(H100, 1, 1, 1, 1, torch.float32, 1) == pytest.approx(START, rel=0.01)
    assert product_seconds(hardware("cpu"), 1, 1, 1, 1, torch.float32, 1) == hardware("cpu").kernel_s


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
