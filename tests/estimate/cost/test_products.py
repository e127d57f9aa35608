"""The role of matmuls, and where their seconds go."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_tp.estimate.cost.flops import Product
from lightning_tp.estimate.cost.hardware import hardware
from lightning_tp.estimate.cost.products import Lost, MatmulShape, shapes_of, with_more_keys

H100 = hardware("h100")


def product(
    m: int, n: int, k: int, phase: str, module: str = "l.*.up", count: int = 3, batch: int = 1, kind: str = "product"
) -> Product:
    flops = 2 * batch * m * n * k * count
    return Product(batch, m, n, k, count, module, phase, kind, "bfloat16", flops, 2 * batch * (m * n + n * k + m * k), flops)


def test_roles() -> None:
    found = [product(64, 344, 128, "forward"), product(64, 128, 344, "backward"), product(128, 344, 64, "backward")]
    roles = {s.role: (s.m, s.n, s.k) for s in shapes_of(found, H100)}
    assert roles == {"forward": (64, 344, 128), "grad of input": (64, 128, 344), "grad of weight": (128, 344, 64)}
    square = [product(8, 8, 8, "forward"), product(8, 8, 8, "backward")]
    assert {s.role for s in shapes_of(square, H100)} == {"forward", "backward"}  # it may be either gradient
    assert {s.role for s in shapes_of([product(9, 9, 9, "backward", batch=4), product(9, 8, 7, "recompute")], H100)} == {
        "backward",
        "recompute",
    }


def test_equal_matmuls_of_several_modules_are_one() -> None:
    (found,) = shapes_of([product(64, 344, 128, "forward", m, n) for m, n in (("l.*.up", 3), ("l.*.gate", 2))], H100)
    assert (found.modules, found.counts, found.count) == (("l.*.gate", "l.*.up"), (2, 3), 5)
    assert found.flops == 2 * 64 * 344 * 128 and found.intensity == found.flops / found.bytes
    assert found.flop_s == found.flops / found.seconds


@pytest.mark.parametrize("sizes", [(64, 344, 128), (8192, 8192, 8192), (16, 8192, 8192), (200, 300, 65536)])
def test_all_seconds_have_a_reason(sizes: tuple[int, int, int]) -> None:
    (found,) = shapes_of([product(*sizes, "forward")], H100)
    ideal = found.flops / (H100.peak(torch.bfloat16) * H100.product_efficiency * H100.sustained)
    assert ideal + sum(found.lost) == pytest.approx(found.seconds)
    assert min(found.lost) > -1e-12 and found.lost.start > 0


def test_a_convolution_waits_for_memory() -> None:
    p = product(0, 0, 0, "forward")
    (found,) = shapes_of([replace(p, bytes=10**9, work=3 * 10**9)], H100)
    assert found.split == 0 and found.lost.memory == pytest.approx(found.seconds, rel=0.1) and found.lost.padding == 0


def test_longest_first() -> None:
    found = shapes_of([product(8, 8, 8, "forward", "a"), product(8192, 8192, 8192, "forward", "b", 1)], H100)
    assert [s.modules for s in found] == [("b",), ("a",)]


def test_attention_to_more_keys() -> None:
    (half,) = shapes_of([product(64, 64, 16, "forward", kind="attention", batch=8)], H100)
    found = with_more_keys(half, 2.0, H100)
    assert (found.m, found.n, found.flops, found.counts) == (64, 128, 2 * half.flops, half.counts)
    assert isinstance(found, MatmulShape) and found.seconds >= half.seconds


def test_lost_adds_up() -> None:
    assert Lost(1, 2, 3, 4, 5).plus(Lost(1, 1, 1, 1, 1), 3) == (4, 5, 6, 7, 8)
