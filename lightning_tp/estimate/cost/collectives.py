"""List what a rank sends and receives in a step: the collectives of the trace, and those that FSDP2 and the gradients add."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from lightning_tp.core.comm.axis import even_shard
from lightning_tp.estimate.rank.rank_model import LocalParam, RankModel, units_of
from lightning_tp.estimate.rank.settings import Precision

OUTSIDE = "outside the blocks"
FINITE = "gradients are finite"
NORM = "norm of gradients"
PARTIAL = "partial gradients"
PER_STEP = frozenset({FINITE, NORM, PARTIAL})  # collectives of a step, and not of a micro-batch


@dataclass(frozen=True)
class Collective:
    """Equal collectives of a rank."""

    kind: Literal["all-reduce", "all-gather", "reduce-scatter"]
    axis: Literal["tp", "dp"]
    ranks: int  # that take part
    bytes: int  # of the full tensor that one reduces or gathers
    count: int  # in a step
    where: str  # the block or FSDP2 unit that it belongs to, or what it is for
    phase: str  # "forward", "recompute", "backward" or "step"


def collectives_of(
    model: RankModel, precision: Precision, tp: int, dp: int, *, accumulate: int = 1, clip: bool = True
) -> tuple[Collective, ...]:
    """Return all collectives of an optimizer step of `accumulate` micro-batches; with `clip` it computes the norm of all gradients.

    The checks of the very first step are left out.
    """
    found: Counter[Collective] = Counter()
    for one in (
        *_of_trace(model, tp, accumulate),
        *(_of_fsdp(model, precision, dp, accumulate) if dp > 1 else ()),
        *_of_gradients(model, precision, tp, dp, clip),
    ):
        found[replace(one, count=0)] += one.count
    return tuple(replace(one, count=count) for one, count in found.items() if count)


def _of_trace(model: RankModel, tp: int, accumulate: int) -> Iterator[Collective]:
    """Yield those on the tensor-parallel axis."""
    for segment in model.trace.segments:
        ran = model.trace.representative(segment)
        for run in () if segment.duplicate else (ran,) if ran is segment else (ran, segment):
            for call, n in run.collectives.items():
                yield Collective(call.kind, "tp", tp, call.bytes, n * accumulate, segment.block, call.phase)


def _of_fsdp(model: RankModel, precision: Precision, dp: int, accumulate: int) -> Iterator[Collective]:
    """Yield those of FSDP2: all-gathers before each forward and backward (the root's stay), and reduce-scatters after the last backward."""
    forwards = Counter(s.block for s in model.trace.segments if s.phase == "forward")
    backwards = Counter(s.block for s in model.trace.segments if s.phase == "backward")
    for name, unit in units_of(model, precision, dp).items():
        where = name or OUTSIDE
        if unit.gathered:
            runs = forwards[name] if name else 1
            again = min(runs, backwards[name]) if name else 0
            yield Collective("all-gather", "dp", dp, unit.gathered, runs * accumulate, where, "forward")
            yield Collective("all-gather", "dp", dp, unit.gathered, again * accumulate, where, "backward")
        if unit.reduced:
            yield Collective("reduce-scatter", "dp", dp, unit.reduced, 1, where, "backward")


def _of_gradients(model: RankModel, precision: Precision, tp: int, dp: int, clip: bool) -> Iterator[Collective]:
    """Yield those once per step: partial gradients are summed, a gradient scaler looks for infinities, and clipping takes the norm."""
    if tp > 1:
        for (over, itemsize), numel in _partial_gradients(model.trained, tp, dp).items():
            yield Collective("all-reduce", "tp", over, numel * itemsize, 1, PARTIAL, "backward")
    for wanted, where in ((precision.scaled, FINITE), (clip and model.trained, NORM)):
        if wanted and tp > 1:
            yield Collective("all-reduce", "tp", tp, 4, 1, where, "step")
        if wanted and dp > 1:
            yield Collective("all-reduce", "dp", dp, 4, 1, where, "step")


def _partial_gradients(params: list[LocalParam], tp: int, dp: int) -> dict[tuple[int, int], int]:
    """Count the elements of gradients that are summed over the tensor-parallel axis, by (ranks, bytes of one), on data-parallel rank 0."""
    found: Counter[tuple[int, int]] = Counter()
    for p in params:
        split = p.split
        if split.sum_over(tp) <= 1:
            continue
        rows = len(even_shard(p.tp_shape[0], 0, dp)) if p.tp_shape else 1
        rest = math.prod(p.tp_shape[1:])
        if split.shared_rows is not None and split.dim is not None:
            start, stop = split.shared_rows
            if split.dim == 0:
                rows = max(0, min(stop, rows) - min(start, rows)) if dp > 1 else stop - start
            else:
                rest = rest // p.tp_shape[split.dim] * (stop - start)
        found[split.sum_over(tp), p.dtype.itemsize] += rows * rest
    return dict(found)
