from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_tp.estimate.cost import gemm_tiling
from lightning_tp.estimate.cost.gemm_tiling import START, tiling
from lightning_tp.estimate.cost.hardware import hardware

H100, A100 = hardware("h100"), hardware("a100")


def bytes_of(m: int, n: int, k: int) -> int:
    return 2 * (m * k + k * n + m * n)


def tiled(hw: object, m: int, n: int, k: int, batch: int = 1) -> gemm_tiling.Tiling:
    return tiling(hw, batch, m, n, k, torch.bfloat16, batch * bytes_of(m, n, k))  # type: ignore[arg-type]


def test_a_last_wave_that_is_nearly_empty_costs_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_tiling, "SPLITS", (1,))
    monkeypatch.setattr(gemm_tiling, "SIDES", (128,))
    few = replace(H100, units=100, tile=(128, 128), memory_bandwidth=1e18)
    full, over = tiled(few, 1280, 1280, 4096), tiled(few, 1281, 1280, 4096)
    assert (full.tiles, full.waves, full.padding, full.idle) == (100, 1, 0, 0)
    assert (over.tiles, over.waves) == (110, 2)
    assert over.idle == pytest.approx(0.9) and over.padding == pytest.approx(1 - 1281 / 1408)
    assert over.computing == pytest.approx(2 * full.computing)
    assert full.computing == pytest.approx(2 * 1280 * 1280 * 4096 / (989e12 * 0.7))
    assert full.seconds == pytest.approx(full.computing + START)
    many = tiled(few, 64, 128, 4096, batch=150)  # each item has a tile of its own, half of it padding
    assert (many.tiles, many.waves, many.padding, many.idle) == (150, 2, 0.5, 0.5)


def test_small_products_take_small_tiles_or_split_the_inner_dimension() -> None:
    large, thin, deep = tiled(H100, 8192, 8192, 8192), tiled(H100, 64, 8192, 512), tiled(H100, 256, 256, 65536)
    assert sorted(large.tile) == [128, 256] and large.split == 1
    assert thin.tile[0] == 64 and thin.padding == 0
    assert deep.split == 8 and deep.tiles > 64
    short = tiled(H100, 256, 256, 256)
    assert short.split == 1  # nothing to split


def test_no_tile_is_larger_than_the_device_computes() -> None:
    t4 = hardware("t4")
    for m in (64, 512, 8192):
        a, b = tiling(t4, 1, m, 4096, 4096, torch.float16, bytes_of(m, 4096, 4096)).tile
        assert a * b <= 128 * 128
    big = tiling(t4, 1, 8192, 8192, 8192, torch.float16, bytes_of(8192, 8192, 8192))
    assert 2 * 8192**3 / big.seconds > 0.9 * 65e12 * t4.product_efficiency
    tiny = replace(t4, tile=(16, 16))  # in a user's file
    assert tiled(tiny, 128, 128, 128).tile == (64, 64)


def test_few_rows_are_bound_by_the_weights_that_are_read() -> None:
    found = tiled(H100, 16, 8192, 8192)
    assert found.moving > found.computing
    assert found.seconds == pytest.approx(bytes_of(16, 8192, 8192) / (3350e9 * 0.85) + START, rel=0.1)


def test_a_cpu_has_no_tiles() -> None:
    found = tiling(hardware("cpu"), 2, 100, 100, 100, torch.float32, 1)
    assert found.tile == (1, 1) and found.padding == found.idle == 0
    assert found.seconds == pytest.approx(2 * 2 * 100**3 / (60e9 * 0.7))


@pytest.mark.parametrize(
    ("device", "m", "n", "k", "tflops"),  # from Vidur's profiles: medians of float16 products, Llama 2 70B and 7B
    [
        (A100, 64, 10240, 8192, 93), (A100, 128, 1280, 8192, 103), (A100, 512, 1280, 8192, 156), (A100, 4096, 10240, 8192, 238),
        (A100, 256, 4096, 1376, 125), (A100, 2048, 57344, 8192, 240), (H100, 64, 10240, 8192, 175), (H100, 128, 1280, 8192, 179),
        (H100, 512, 1536, 4096, 358), (H100, 4096, 10240, 8192, 694), (H100, 256, 2752, 4096, 289), (H100, 2048, 57344, 8192, 704),
    ],
)  # fmt: skip
def test_against_measured_kernels(device: object, m: int, n: int, k: int, tflops: float) -> None:
    assert 2 * m * n * k / tiled(device, m, n, k).seconds == pytest.approx(tflops * 1e12, rel=0.2)
