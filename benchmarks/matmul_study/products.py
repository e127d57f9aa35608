"""Describe the matmuls of a rank one by one: their role, how they are cut into tiles, how fast they are, and where their time goes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lightning_tp.estimate.cost.flops import Product
from lightning_tp.estimate.cost.gemm_tiling import START, Tiling, tiling
from lightning_tp.estimate.cost.hardware import Hardware
from lightning_tp.estimate.cost.roofline import kernel_seconds
from lightning_tp.estimate.trace.step_trace import Op


class Lost(NamedTuple):
    """Seconds of matmuls beyond those of their FLOPs at the peak that is achieved in training.

    Args:
        padding: tiles that reach over the edge.
        waves: multiprocessors that idle in the last wave.
        tiles: small tiles, which read more for each FLOP.
        memory: waiting for memory.
        start: kernel launch latency.
    """

    padding: float = 0.0
    waves: float = 0.0
    tiles: float = 0.0
    memory: float = 0.0
    start: float = 0.0

    def plus(self, other: Lost, times: int = 1) -> Lost:
        """Return the sum of this and `times` the other."""
        return Lost(*(a + times * b for a, b in zip(self, other)))


NOTHING = Lost()


@dataclass(frozen=True)
class MatmulShape:
    """Equal matmuls of a rank: `batch` times (m, k) x (k, n).

    Args:
        modules: that compute them, with the block's number as `*`.
        role: "forward", "recompute", "grad of input", "grad of weight", or "backward" where it is unknown which.
        kind: "product" or "attention" (fused: m queries, n keys of width k).
        batch, m, n, k: the sizes; 0 for a convolution.
        dtype: of the operands.
        counts: of each of the modules, in a step.
        flops, bytes, seconds: of one; the seconds as in the middle of training.
        tile, split: how it is cut; (0, 0) and 0 where that is unknown.
        padding: share of the tiles' area that is padding.
        idle: share of the last wave's multiprocessors that idle.
        lost: where the seconds of one go.
    """

    modules: tuple[str, ...]
    role: str
    kind: str
    batch: int
    m: int
    n: int
    k: int
    dtype: str
    counts: tuple[int, ...]
    flops: int
    bytes: int
    seconds: float
    tile: tuple[int, int] = (0, 0)
    split: int = 0
    padding: float = 0.0
    idle: float = 0.0
    lost: Lost = NOTHING

    @property
    def count(self) -> int:
        """The number of all of them in a step."""
        return sum(self.counts)

    @property
    def intensity(self) -> float:
        """FLOPs for each byte that is moved."""
        return self.flops / self.bytes

    @property
    def flop_s(self) -> float:
        """Predicted FLOP/s."""
        return self.flops / self.seconds


def shapes_of(products: Iterable[Product], hw: Hardware) -> tuple[MatmulShape, ...]:
    """Return the matmuls of an estimate with their roles, tiles and times; those of equal shape and role as one."""
    products = list(products)
    forwards = {p.module: p for p in products if p.phase == "forward" and p.kind == "product"}
    modules: dict[Any, Counter[str]] = defaultdict(Counter)
    first: dict[Any, Product] = {}
    work: Counter[Any] = Counter()
    for p in products:
        key = (_role(p, forwards.get(p.module)), p.kind, p.batch, p.m, p.n, p.k, p.dtype, p.bytes)
        modules[key][p.module] += p.count
        work[key] += p.work
        first.setdefault(key, p)
    made = [shape_of(hw, p, key[0], modules[key], work[key] // modules[key].total()) for key, p in first.items()]
    return tuple(sorted(made, key=lambda s: -s.seconds * s.count))


def shape_of(hw: Hardware, p: Product, role: str, modules: Mapping[str, int], work: int) -> MatmulShape:
    """Return one of them, with its time.

    Args:
        hw: the device.
        p: the matmul.
        role: see `MatmulShape`.
        modules: how often each computes it.
        work: FLOPs of one that have to be computed.
    """
    names = tuple(sorted(modules))
    counts = tuple(modules[n] for n in names)
    dtype = getattr(torch, p.dtype)
    sizes = (p.batch, p.m, p.n, p.k)
    if p.kind == "product" and p.m:
        t = tiling(hw, *sizes, dtype, p.bytes)
        lost = Lost(*(x / hw.sustained for x in _lost(hw, t, work, dtype)))
        seconds = t.seconds / hw.sustained  # as in the middle of training: see `roofline`
        return MatmulShape(
            names, role, p.kind, *sizes, p.dtype, counts, work, p.bytes, seconds, t.tile, t.split, t.padding, t.idle, lost
        )
    seconds = kernel_seconds(hw, Op(p.kind, "", "", "forward", work, work, p.bytes, (), dtype))
    lost = (
        Lost(memory=max(0.0, seconds - work / (hw.peak(dtype) * hw.product_efficiency * hw.sustained)))
        if p.kind == "product"
        else NOTHING
    )
    return MatmulShape(names, role, p.kind, *sizes, p.dtype, counts, work, p.bytes, seconds, lost=lost)


def _lost(hw: Hardware, t: Tiling, work: int, dtype: torch.dtype) -> Lost:
    """Go from its FLOPs at the achievable peak to its seconds, one reason after the other."""
    ideal = work / (hw.peak(dtype) * hw.product_efficiency)
    start = START if hw.device != "cpu" else 0.0
    padded = ideal / (1 - t.padding)
    waved = padded * t.waves / (t.waves - t.idle)
    return Lost(padded - ideal, waved - padded, t.computing - waved, t.seconds - start - t.computing, start)


def _role(p: Product, forward: Product | None) -> str:
    if p.kind == "attention" or p.phase != "backward" or forward is None or not p.m or p.batch > 1:
        return p.phase
    m, n, k = forward.m, forward.n, forward.k
    of_input = (p.m, p.n, p.k) == (m, k, n)
    of_weight = p.k == m and {p.m, p.n} == {n, k}
    if of_input == of_weight:
        return "backward"
    return "grad of input" if of_input else "grad of weight"


def with_more_keys(s: MatmulShape, times: float, hw: Hardware) -> MatmulShape:
    """Return the attention of the same queries to `times` as many keys."""
    product = Product(s.batch, s.m, round(s.n * times), s.k, s.count, "", s.role, s.kind, s.dtype, 0, s.bytes, 0)
    return shape_of(hw, product, s.role, dict(zip(s.modules, s.counts)), round(s.flops * times))
