"""List what a rank sends and receives in a step: the collectives of the trace, and those that FSDP2 and the gradients add."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lightning_tp.core.comm.axis import even_shard
from lightning_tp.estimate.rank.fsdp_units import units_of
from lightning_tp.estimate.rank.rank_model import LocalParam, RankModel
from lightning_tp.estimate.rank.settings import Precision

Kind = Literal["all-reduce", "all-gather", "reduce-scatter"]
FINITE = "gradients are finite"
NORM = "norm of gradients"
PARTIAL = "partial gradients"
PER_STEP = frozenset({FINITE, NORM, PARTIAL})  # collectives of a step, and not of a micro-batch


@dataclass(frozen=True)
class Collective:
    """Equal collectives of a rank.

    Args:
        kind: "all-reduce", "all-gather" or "reduce-scatter".
        axis: "tp" or "dp".
        ranks: that take part.
        bytes: of the full tensor that one reduces or gathers.
        count: in a step.
        where: the block or FSDP2 unit that it belongs to, or what it is for.
        phase: "forward", "recompute", "backward" or "step".
    """

    kind: Kind
    axis: Literal["tp", "dp"]
    ranks: int
    bytes: int
    count: int
    where: str
    phase: str


class _One(NamedTuple):
    """A collective, without its count."""

    kind: Kind
    axis: Literal["tp", "dp"]
    ranks: int
    bytes: int
    where: str
    phase: str


def collectives_of(
    model: RankModel, precision: Precision, tp: int, dp: int, *, accumulate: int = 1, clip: bool = True
) -> tuple[Collective, ...]:
    """Return all collectives of one optimizer step; the checks of the very first step are left out.

    Args:
        model: traced.
        precision: of the training.
        tp, dp: the mesh.
        accumulate: micro-batches of a step.
        clip: whether the norm of all gradients is computed.
    """
    found: Counter[_One] = Counter()
    for one, count in _of_trace(model, tp):
        found[one] += count * accumulate
    for one, count in _of_fsdp(model, precision, dp, accumulate) if dp > 1 else ():
        found[one] += count
    for one in _of_step(model, precision, tp, dp, clip):
        found[one] += 1
    return tuple(
        Collective(one.kind, one.axis, one.ranks, one.bytes, count, one.where, one.phase) for one, count in found.items() if count
    )


def _of_trace(model: RankModel, tp: int) -> Iterator[tuple[_One, int]]:
    """Yield those of a micro-batch on the tensor-parallel axis."""
    for segment in model.trace.segments:
        ran = model.trace.representative(segment)
        for run in () if segment.duplicate else (ran,) if ran is segment else (ran, segment):
            for call, count in run.collectives.items():
                yield _One(call.kind, "tp", tp, call.bytes, segment.block, call.phase), count  # type: ignore[arg-type]


def _of_fsdp(model: RankModel, precision: Precision, dp: int, accumulate: int) -> Iterator[tuple[_One, int]]:
    """Yield those of FSDP2: all-gathers before each forward and backward, a reduce-scatter after the last backward."""
    forwards = Counter(s.block for s in model.trace.segments if s.phase == "forward")
    backwards = Counter(s.block for s in model.trace.segments if s.phase == "backward")
    for name, unit in units_of(model, precision, dp).items():
        if not unit.gathered:
            continue
        where = name or "outside the blocks"
        gather = _One("all-gather", "dp", dp, unit.gathered, where, "forward")
        if name:
            yield gather, forwards[name] * accumulate
            yield gather._replace(phase="backward"), min(forwards[name], backwards[name]) * accumulate
        else:  # the root's stay unsharded
            yield gather, accumulate
        if unit.reduced:
            yield _One("reduce-scatter", "dp", dp, unit.reduced, where, "backward"), 1


def _of_step(model: RankModel, precision: Precision, tp: int, dp: int, clip: bool) -> Iterator[_One]:
    """Yield those of gradients: partial ones are summed, a scaled loss looks for infinities, and clipping takes the norm."""
    if tp > 1:
        for (over, itemsize), numel in _partial_gradients(model.trained, dp).items():
            yield _One("all-reduce", "tp", over, numel * itemsize, PARTIAL, "backward")
    axes: list[tuple[Literal["tp", "dp"], int]] = [("tp", tp), ("dp", dp)]
    for wanted, where in ((precision.scaled, FINITE), (clip and bool(model.trained), NORM)):
        for axis, ranks in axes:
            if wanted and ranks > 1:
                yield _One("all-reduce", axis, ranks, 4, where, "step")


def _partial_gradients(params: list[LocalParam], dp: int) -> dict[tuple[int, int], int]:
    """Count the elements of gradients that are summed over the tensor-parallel axis, by (ranks, bytes of one), on data-parallel rank 0."""
    found: Counter[tuple[int, int]] = Counter()
    for p in params:
        split = p.split
        if split.sum_over <= 1:
            continue
        rows = len(even_shard(p.tp_shape[0], 0, dp)) if p.tp_shape else 1
        rest = math.prod(p.tp_shape[1:])
        if split.sum_rows is not None and split.dim is not None:
            start, stop = split.sum_rows
            if split.dim == 0:
                rows = max(0, min(stop, rows) - min(start, rows)) if dp > 1 else stop - start
            else:
                rest = rest // p.tp_shape[split.dim] * (stop - start)
        found[split.sum_over, p.dtype.itemsize] += rows * rest
    return dict(found)
