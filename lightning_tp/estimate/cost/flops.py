"""Count what a rank computes: its matmuls, and their FLOPs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning_tp.core.modules.blocks import enclosing
from lightning_tp.estimate.rank.rank_model import RankModel
from lightning_tp.estimate.trace.step_trace import Op


@dataclass(frozen=True)
class Product:
    """Equal matmuls of a rank: `batch` times (m, k) x (k, n)."""

    # batch, m, n, k: the sizes; of a fused attention (heads x samples, queries, keys, head width); all 0 for a convolution
    batch: int
    m: int
    n: int
    k: int
    count: int  # in one micro-batch
    module: str  # whose, with the block's number as `*`
    phase: str  # "forward", "recompute" or "backward"
    kind: str  # "product" or "attention"
    dtype: str  # of the operands
    flops: int  # of all of them together
    bytes: int  # read and written by each
    work: int  # the part of `flops` that has to be computed (half of them for causal attention)


@dataclass(frozen=True)
class Flops:
    """FLOPs of a micro-batch."""

    model: int  # of the full model, forward and backward, without recomputation; attention in full (as papers count it)
    rank: int  # of one rank, with recomputation; of causal attention the half that is computed


def flops_of(rank: RankModel, unsharded: RankModel) -> Flops:
    """Return the FLOPs of a micro-batch, from the model on one rank and that in one process."""
    model = sum(op.flops * n for op, n in ops_of(unsharded) if op.phase != "recompute")
    return Flops(model, sum(op.work * n for op, n in ops_of(rank)))


def products_of(model: RankModel) -> tuple[Product, ...]:
    """Return all matmuls of a micro-batch on the rank, those with most FLOPs first."""
    blocks = set(model.blocks)
    count: Counter[tuple[Any, ...]] = Counter()
    flops: Counter[tuple[Any, ...]] = Counter()
    work: Counter[tuple[Any, ...]] = Counter()
    for op, n in ops_of(model):
        if op.kind != "other":
            dtype = str(op.dtype).removeprefix("torch.")
            key = (op.shape or (0, 0, 0, 0), _starred(op.module, blocks), op.phase, op.kind, dtype, op.bytes)
            count[key] += n
            flops[key] += n * op.flops
            work[key] += n * op.work
    made = []
    for key in count:
        (batch, m, n, k), module, phase, kind, dtype, size = key
        made.append(Product(batch, m, n, k, count[key], module, phase, kind, dtype, flops[key], size, work[key]))
    return tuple(sorted(made, key=lambda p: -p.flops))


def ops_of(model: RankModel) -> Iterator[tuple[Op, int]]:
    """Yield all kernels of a micro-batch in eager mode, and how often each runs."""
    for segment in model.trace.segments:
        if not segment.duplicate:
            yield from model.trace.representative(segment).ops.items()


def _starred(module: str, blocks: set[str]) -> str:
    block = enclosing(module, blocks)
    return f"{block.rpartition('.')[0]}.*{module[len(block) :]}" if block else module
