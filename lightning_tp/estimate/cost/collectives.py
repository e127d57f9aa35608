"""What a rank sends and receives in a step: on the tensor-parallel axis as traced, and what FSDP2 and the gradients add."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from lightning_tp.core.comm.axis import even_shard
from lightning_tp.estimate.cost.memory import trained, units_of
from lightning_tp.estimate.rank.rank_model import LocalParam, RankModel
from lightning_tp.estimate.rank.settings import Precision


@dataclass(frozen=True)
class Collective:
    """Collectives of a rank that are alike.

    Args:
        kind: "all-reduce", "all-gather" or "reduce-scatter".
        axis: "tp", "dp".
        ranks: that take part.
        bytes: of one: the whole tensor that is summed or gathered.
        count: in a step.
        where: the block it belongs to, a unit of FSDP2, or what it is for.
        phase: "forward", "recompute", "backward", "step".
    """

    kind: Literal["all-reduce", "all-gather", "reduce-scatter"]
    axis: Literal["tp", "dp"]
    ranks: int
    bytes: int
    count: int
    where: str
    phase: str


def collectives_of(
    world: RankModel, precision: Precision, tp: int, dp: int, *, accumulate: int = 1, clip: bool = True, rank: int = 0
) -> tuple[Collective, ...]:
    """All collectives of one optimizer step (but for what is checked in the very first)."""
    found: Counter[tuple[object, ...]] = Counter()
    for piece in world.trace.pieces:
        if piece.again:
            continue
        for sent, n in world.trace.of(piece).sent.items():
            found[sent.kind, "tp", tp, sent.bytes, piece.block, sent.phase] += n * accumulate
        if piece.like is not None:
            for sent, n in piece.sent.items():
                found[sent.kind, "tp", tp, sent.bytes, piece.block, sent.phase] += n * accumulate
    if dp > 1:
        units = units_of(world, precision, dp)
        runs = Counter(p.block for p in world.trace.pieces if p.phase == "forward")
        back = Counter(p.block for p in world.trace.pieces if p.phase == "backward")
        for name, unit in units.items():
            if not unit.gathered:
                continue
            where = name or "outside of blocks"
            if not name:
                found["all-gather", "dp", dp, unit.gathered, where, "forward"] += accumulate
            else:
                found["all-gather", "dp", dp, unit.gathered, where, "forward"] += runs[name] * accumulate
                found["all-gather", "dp", dp, unit.gathered, where, "backward"] += min(runs[name], back[name]) * accumulate
            if unit.summed:
                found["reduce-scatter", "dp", dp, unit.summed, where, "backward"] += 1
    mine = trained(world)
    if tp > 1:
        for (over, dtype), size in _shares(mine, dp).items():
            found["all-reduce", "tp", over, size * dtype, "shares of gradients", "backward"] += 1
    axes = [(name, n) for name, n in (("tp", tp), ("dp", dp)) if n > 1]
    for name, n in axes if precision.scaled else ():
        found["all-reduce", name, n, 4, "whether gradients are finite", "step"] += 1
    for name, n in axes if clip and mine else ():
        found["all-reduce", name, n, 4, "norm of gradients", "step"] += 1
    return tuple(
        Collective(kind, axis, ranks, size, n, where, phase)  # type: ignore[arg-type]
        for (kind, axis, ranks, size, where, phase), n in found.items()
        if n
    )


def _shares(mine: list[LocalParam], dp: int) -> dict[tuple[int, int], int]:
    """Elements of gradients that are summed at the end of the backward, by (ranks, bytes of one), on the first data-parallel rank."""
    found: Counter[tuple[int, int]] = Counter()
    for h in mine:
        split = h.split
        if split.sum_over <= 1:
            continue
        rows = len(even_shard(h.tp_shape[0], 0, dp)) if h.tp_shape else 1
        rest = math.prod(h.tp_shape[1:])
        if split.sum_rows is not None and split.dim is not None:
            start, stop = split.sum_rows
            if split.dim == 0:
                rows = max(0, min(stop, rows) - min(start, rows)) if dp > 1 else stop - start
            else:
                rest = rest // h.tp_shape[split.dim] * (stop - start)
        found[split.sum_over, h.dtype.itemsize] += rows * rest
    return dict(found)
