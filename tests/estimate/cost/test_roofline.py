from __future__ import annotations

import pytest
import torch

from lightning_tp.estimate.cost.gemm_tiling import START
from lightning_tp.estimate.cost.hardware import hardware
from lightning_tp.estimate.cost.roofline import collective_seconds, in_node, kernel_seconds, product_seconds
from tests.estimate.by_hand import op

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


def test_a_kernel_takes_the_longer_of_computing_and_moving() -> None:
    slow = H100.sustained
    bandwidth = H100.memory_bandwidth * H100.memory_efficiency
    assert kernel_seconds(H100, op("add", bytes=10**9)) == pytest.approx(10**9 / bandwidth / slow)
    assert kernel_seconds(H100, op("add", bytes=1)) == H100.kernel_s
    computing = 10**12 / (H100.peak(torch.float32) * H100.attention_efficiency) / slow
    assert kernel_seconds(H100, op("sdpa", flops=2 * 10**12, work=10**12)) == pytest.approx(computing)  # half is masked
    shape = (1, 512, 512, 512)
    assert kernel_seconds(H100, op("mm", flops=1, bytes=3, shape=shape)) == product_seconds(H100, *shape, torch.float32, 3) / slow
