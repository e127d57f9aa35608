"""What a rank computes: its matrix products, and their FLOPs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from lightning_tp.estimate.rank.rank_model import RankModel


@dataclass(frozen=True)
class Product:
    """Matrix products of a rank that are alike: `batch` times (m, k) x (k, n).

    Args:
        batch, m, n, k: the sizes; of a fused attention (heads x samples, queries, keys, width of a head); all 0 for a convolution.
        count: in one micro-batch.
        module: whose, with the number of the block as `*`.
        phase: "forward", "recompute" or "backward".
        kind: "product" or "attention".
        dtype: of the operands.
        flops: of all of them.
        bytes: read and written by one.
        work: the part of `flops` that has to be done (half, for causal attention).
    """

    batch: int
    m: int
    n: int
    k: int
    count: int
    module: str
    phase: str
    kind: str
    dtype: str
    flops: int
    bytes: int
    work: int


@dataclass(frozen=True)
class Flops:
    """FLOPs of a micro-batch.

    Args:
        model: of the whole model, forward and backward, without what is run again; attention in full (as papers count it).
        rank: of one rank, with what is run again; of causal attention the half that is computed.
    """

    model: int
    rank: int


def products_of(world: RankModel) -> tuple[Product, ...]:
    """All products of a micro-batch on the rank, the largest first."""
    blocks = set(world.blocks)
    found: Counter[tuple[object, ...]] = Counter()
    flops: Counter[tuple[object, ...]] = Counter()
    work: Counter[tuple[object, ...]] = Counter()
    for piece in world.trace.pieces:
        if piece.again:
            continue
        for op, n in world.trace.of(piece).ops.items():
            if op.kind == "other":
                continue
            shape = op.shape or (0, 0, 0, 0)
            key = (*shape, _starred(op.module, blocks), op.phase, op.kind, str(op.dtype).removeprefix("torch."), op.bytes)
            found[key] += n
            flops[key] += n * op.flops
            work[key] += n * op.work
    made = [
        Product(b, m, n, k, found[key], module, phase, kind, dtype, flops[key], size, work[key])  # type: ignore[arg-type]
        for key in found
        for b, m, n, k, module, phase, kind, dtype, size in (key,)
    ]
    return tuple(sorted(made, key=lambda p: -p.flops))


def _starred(module: str, blocks: set[str]) -> str:
    where = module
    while where and where not in blocks:
        where = where.rpartition(".")[0]
    return f"{where.rpartition('.')[0]}.*{module[len(where) :]}" if where else module


def flops_of_model(whole: RankModel) -> int:
    """Of the model as it is in one process (traced as `whole`), forward and backward; attention in full."""
    return sum(
        op.flops * n
        for piece in whole.trace.pieces
        if not piece.again
        for op, n in whole.trace.of(piece).ops.items()
        if op.phase != "recompute"
    )


def flops_of_rank(world: RankModel) -> int:
    """What a rank computes, with what is run again."""
    return sum(op.work * n for piece in world.trace.pieces if not piece.again for op, n in world.trace.of(piece).ops.items())
