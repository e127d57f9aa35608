"""Model how a GPU cuts a matmul into tiles, what that leaves idle, and how long it takes.

A matmul is computed in tiles of its result, one on each streaming multiprocessor at a time. A tile that reaches over the edge costs as much as a
full one (tile quantization), and a last wave of tiles that does not fill the device as much as one that does (wave quantization): NVIDIA,
"Matrix Multiplication Background User's Guide", section 3. A library has kernels for several tile sizes, and some that cut the inner dimension
as well (split-k), and takes the fastest: small tiles fill the device where the matmul is small, but read more for each FLOP. So does this model,
of `SIDES` and `SPLITS`.

Three numbers are the same for all devices. They were fitted to published kernel times: the float16 forward matmuls of eight models at
tensor-parallel sizes 1, 2, 4 and 8, for 64 to 32,768 tokens on A100 and to 4,096 on H100, in the profiles that come with the simulator Vidur
(Agrawal et al. 2024, arXiv 2405.05465). On 3,960 of these the mean error is 8% on A100 and 10% on H100, with the efficiencies of
`hardware.json`; with a single tile size of 128 x 256 it was 19% and 22%. `benchmarks/shapes.py --published` repeats the comparison. Gradients
have not been compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from lightning_tp.estimate.cost.hardware import Hardware

SIDES = (64, 128, 256)  # of tiles; none is larger than `Hardware.tile` in area
SPLITS = (1, 2, 4, 8)  # parts of the inner dimension
SHORTEST = 256  # of such parts
READS = 20.0  # a tile of a x b takes 1 + READS (1 / a + 1 / b) times the time of its FLOPs: the smaller it is, the more it reads for each
START = 5e-6  # seconds before the first tile computes and after the last one, together
BLUNT = 4  # where computing and moving take equally long, they slow each other down: (a ** BLUNT + b ** BLUNT) ** (1 / BLUNT)


class Tiling(NamedTuple):
    """How a matmul is cut into tiles."""

    tile: tuple[int, int]  # rows and columns of the result that one multiprocessor computes at a time
    split: int  # parts of the inner dimension
    tiles: int  # their number, over all parts
    waves: int  # rounds of as many tiles as there are multiprocessors
    padding: float  # share of the tiles' area that lies outside the result, from 0 to 1
    idle: float  # share of the last wave's multiprocessors that have no tile, from 0 to 1
    computing: float  # seconds of the waves
    moving: float  # seconds of reading and writing
    seconds: float  # of the matmul


def tiling(hw: Hardware, batch: int, m: int, n: int, k: int, dtype: torch.dtype, size: int) -> Tiling:
    """Return the fastest tiling of `batch` matmuls (m, k) x (k, n), which move `size` bytes. A CPU has no tiles: theirs are (1, 1).

    Example:
        >>> from lightning_tp.estimate.cost.hardware import hardware
        >>> found = tiling(hardware("h100"), 1, 8192, 8192, 8192, torch.bfloat16, 3 * 2 * 8192**2)  # 132 units
        >>> found.tile, found.split, found.tiles, found.waves, round(found.idle, 2)
        ((256, 128), 1, 2048, 16, 0.48)
    """
    peak, bandwidth = hw.peak(dtype) * hw.product_efficiency, hw.memory_bandwidth * hw.memory_efficiency
    if hw.device == "cpu":
        computing, moving = 2 * batch * m * n * k / peak, size / bandwidth
        return Tiling((1, 1), 1, batch * m * n, 1, 0.0, 0.0, computing, moving, max(computing, moving, hw.kernel_s))
    return min(_tilings(hw, batch, m, n, k, peak, bandwidth, size), key=lambda t: t.seconds)


def _tilings(hw: Hardware, batch: int, m: int, n: int, k: int, peak: float, bandwidth: float, size: int) -> Iterator[Tiling]:
    sizes = [(a, b) for a in reversed(SIDES) for b in reversed(SIDES) if a * b <= max(hw.tile[0] * hw.tile[1], min(SIDES) ** 2)]
    least = min(_reads(a, b) for a, b in sizes)  # the peak is what the best tile reaches
    for a, b in sizes:
        cut = batch * math.ceil(m / a) * math.ceil(n / b)
        padding = 1 - batch * m * n / (cut * a * b)
        for split in SPLITS:
            if split > 1 and k < split * SHORTEST:
                break
            tiles = cut * split
            waves = math.ceil(tiles / hw.units)
            computing = waves * hw.units * 2 * a * b * math.ceil(k / split) * (_reads(a, b) / least) / peak
            between = 8 * batch * m * n * split if split > 1 else 0  # the parts' sums, in float32, written and read
            moving = (size + between) / bandwidth
            seconds = (computing**BLUNT + moving**BLUNT) ** (1 / BLUNT) + START
            yield Tiling((a, b), split, tiles, waves, padding, waves - tiles / hw.units, computing, moving, seconds)


def _reads(a: int, b: int) -> float:
    return 1 + READS * (1 / a + 1 / b)
