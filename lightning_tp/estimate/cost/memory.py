"""Compute what is in the memory of one rank over a step, by category.

A step is a row of moments: each segment of the trace at its peak, each reduce-scatter of FSDP2, and the step of the optimizer. Each source of
memory (parameters, gradients, activations, FSDP2's buffers, ..) is a function of its own that yields changes, (time, category, bytes). Their
cumulative sums are the memory at each moment.

FSDP2's buffers follow its sources (`torch/distributed/fsdp/_fully_shard`). A unit's all-gathered parameters are there while it runs, beside the
flat tensor that they were gathered into: in the forward its own, in the backward that of the unit that is prefetched. The flat input of a unit's
reduce-scatter stays until the next unit's. The root's parameters and gradients are unsharded from the first module to the end of the backward.

Not in here: what the allocator rounds up and fragments, the CUDA context, and NCCL's buffers: see `Hardware.reserved_bytes` and `fragmentation`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

from lightning_tp.core.modules.blocks import enclosing
from lightning_tp.estimate.cost.activations import LiveSegment, live_segments
from lightning_tp.estimate.rank.rank_model import RankModel, Unit, units_of
from lightning_tp.estimate.rank.settings import Precision

Kinds = Mapping[str, int]


@dataclass(frozen=True)
class MemorySnapshot:
    """The memory at one moment."""

    name: str  # such as "backward of layers.79"
    kinds: Kinds  # bytes by category

    @property
    def total(self) -> int:
        """Bytes of all categories."""
        return sum(self.kinds.values())


@dataclass(frozen=True)
class Memory:
    """What one rank holds, in bytes."""

    # parameters, gradients, optimizer, buffers: from one step to the next (gradients: after the backward)
    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    activations: Kinds  # saved for the backward when the forward has ended, by category
    peak: MemorySnapshot  # the moment with most
    timeline: tuple[MemorySnapshot, ...]  # all moments of the step, in order


def memory_of(model: RankModel, precision: Precision, dp: int, *, optimizer: int, scratch: int, accumulate: int = 1) -> Memory:
    """Return the memory of a rank over a step: over its last micro-batch, if there are several.

    Of the optimizer, it takes the bytes of its state, and those that its step needs temporarily (`scratch`).
    """
    step = _Step(model, units_of(model, precision, dp) if dp > 1 else {}, optimizer, scratch, accumulate)
    changes = [change for source in SOURCES for change in source(step)]
    timeline = tuple(_snapshots(step.moments, changes))
    saved = [s.after for s in step.live if s.segment.phase == "forward"][-1]
    return Memory(
        sum(p.bytes for p in model.params),
        step.gradient_bytes,
        optimizer,
        model.buffer_bytes,
        {category: n for category, n in saved.items() if n > 0 and category != "gradient"},
        max(timeline, key=lambda m: m.total),
        timeline,
    )


class Change(NamedTuple):
    """Bytes that begin (above 0) or end (below 0) at a moment, and stay so."""

    time: int
    category: str
    bytes: int


def _during(time: int, category: str, size: int) -> Iterator[Change]:
    yield Change(time, category, size)
    yield Change(time + 1, category, -size)


def _snapshots(moments: Iterable[_Moment], changes: Iterable[Change]) -> Iterator[MemorySnapshot]:
    """Yield the memory at each moment: the sum of all changes up to it."""
    at: dict[int, list[Change]] = defaultdict(list)
    for change in changes:
        at[change.time].append(change)
    held: Counter[str] = Counter()
    for moment in moments:
        for change in at[moment.time]:
            held[change.category] += change.bytes
        yield MemorySnapshot(moment.name, {category: n for category, n in held.items() if n > 0})


class _Moment(NamedTuple):
    """A moment of the step: a segment at its peak, a reduce-scatter of FSDP2 ("reduce"), or the step of the optimizer."""

    time: int  # its place among all
    name: str
    kind: Literal["forward", "backward", "reduce", "reduce root", "optimizer"]
    live: LiveSegment
    unit: Unit | None = None  # of FSDP2, whose block runs; None outside of blocks, and for a block that is no unit of its own

    @property
    def block(self) -> str:
        """The block that runs; "" outside of blocks."""
        return self.live.segment.block


@dataclass(frozen=True)
class _Step:
    """A step, as all sources of memory see it; see `memory_of`."""

    model: RankModel
    units: Mapping[str, Unit]  # FSDP2's; none with one data-parallel rank
    optimizer: int
    scratch: int
    accumulate: int

    @cached_property
    def live(self) -> list[LiveSegment]:
        """All segments with their live bytes."""
        return live_segments(self.model)

    @cached_property
    def moments(self) -> list[_Moment]:
        """All moments in order; the step of the optimizer is the last one."""
        found: list[_Moment] = []
        for live in self.live:
            segment = live.segment
            unit = self.units.get(segment.block) if segment.block else None
            where = f" of {segment.block}" if segment.block else " pass, outside the blocks"
            if not segment.duplicate:
                found.append(_Moment(len(found), segment.phase + where, segment.phase, live, unit))
            if segment.phase == "backward" and unit is not None and unit.reduced:
                found.append(_Moment(len(found), f"gradient reduction of {segment.block}", "reduce", live, unit))
        if self.root.reduced:
            found.append(_Moment(len(found), "gradient reduction, outside the blocks", "reduce root", self.live[-1]))
        return [*found, _Moment(len(found), "step of the optimizer", "optimizer", self.live[-1])]

    @property
    def root(self) -> Unit:
        """FSDP2's unit of all that is in no block."""
        return self.units.get("", Unit(0, 0, 0))

    @property
    def end(self) -> int:
        """The time of the optimizer's step."""
        return len(self.moments) - 1

    @property
    def backward_end(self) -> int:
        """The time after all segments and the reduce-scatters of blocks."""
        return self.end - (self.root.reduced > 0)

    @property
    def gradient_bytes(self) -> int:
        """Gradients of all parameters, as held after the backward."""
        return sum(p.bytes for p in self.model.trained)

    @property
    def next_units(self) -> list[tuple[_Moment, _Moment]]:
        """Each unit in the order of the forward, and the next one."""
        return list(pairwise(m for m in self.moments if m.kind == "forward" and m.unit is not None))


def _model_state(step: _Step) -> Iterator[Change]:
    yield Change(0, "parameters", sum(p.bytes for p in step.model.params))
    yield Change(0, "optimizer", step.optimizer)
    yield Change(0, "buffers", step.model.buffer_bytes)
    yield Change(step.end, "optimizer's scratch", step.scratch)


def _gathered_parameters(step: _Step) -> Iterator[Change]:
    """Yield the unsharded parameters of the unit that runs, and the root's through forward and backward."""
    yield Change(0, "gathered parameters", step.root.gathered)
    yield Change(step.backward_end, "gathered parameters", -step.root.gathered)
    for m in step.moments:
        if m.unit is not None and m.kind in ("forward", "backward"):
            yield from _during(m.time, "gathered parameters", m.unit.gathered)


def _gradients(step: _Step) -> Iterator[Change]:
    """Yield the gradients as they are held between steps: with FSDP2, each unit's shard from its reduce-scatter on."""
    held = 0
    for change in _sharded_gradients(step) if step.units else _block_gradients(step):
        held += change.bytes
        yield change
    yield Change(step.end, "gradients", step.gradient_bytes - held)


def _sharded_gradients(step: _Step) -> Iterator[Change]:
    for m in step.moments:
        if m.kind == "backward" and m.unit is not None:
            yield Change(m.time + 1, "gradients", m.unit.gradients)
        elif m.kind == "reduce root":
            yield Change(m.time, "gradients", step.root.gradients)


def _block_gradients(step: _Step) -> Iterator[Change]:
    """Yield each block's from the end of its backward on; with accumulation, all are there from the micro-batches before."""
    if step.accumulate > 1:
        yield Change(0, "gradients", step.gradient_bytes)
        return
    blocks = set(step.model.blocks)
    by_block: Counter[str] = Counter()
    for p in step.model.trained:
        by_block[enclosing(p.name, blocks)] += math.prod(p.tp_shape) * p.dtype.itemsize
    for m in step.moments:
        if m.kind == "backward" and m.block:
            yield Change(m.time + 1, "gradients", by_block[m.block])


def _accumulated_gradients(step: _Step) -> Iterator[Change]:
    """Yield the unsharded gradients of earlier micro-batches, which FSDP2 keeps until each unit's reduce-scatter."""
    if step.accumulate == 1:
        return
    left = sum(unit.reduced for unit in step.units.values())
    yield Change(0, "unsharded gradients", left)
    for m in step.moments:
        if m.kind == "reduce" and m.unit is not None:
            left -= m.unit.reduced
            yield Change(m.time + 1, "unsharded gradients", -m.unit.reduced)
    yield Change(step.backward_end, "unsharded gradients", -left)


def _all_gather_buffers(step: _Step) -> Iterator[Change]:
    """Yield the flat tensors that parameters are gathered into: the unit's own, in the backward that of the next one, which is prefetched."""
    prefetched = {after.block: before.unit for before, after in step.next_units}
    for m in step.moments:
        unit = prefetched.get(m.block) if m.kind in ("backward", "reduce") else m.unit
        if unit is not None:
            yield from _during(m.time, "FSDP2 buffers", unit.gathered)


def _reduce_scatter_buffers(step: _Step) -> Iterator[Change]:
    """Yield the flat inputs of reduce-scatters: a unit's own, and while its backward runs that of the unit before it in the backward."""
    pending = {before.block: after.unit for before, after in step.next_units}
    first = next((m.unit.reduced for m in step.moments if m.unit is not None), 0)  # of the forward: the last one of the backward
    for m in step.moments:
        unit = pending.get(m.block) if m.kind == "backward" else m.unit if m.kind == "reduce" else None
        if unit is not None:
            yield from _during(m.time, "FSDP2 buffers", unit.reduced)
        elif m.kind == "reduce root":
            yield from _during(m.time, "FSDP2 buffers", step.root.reduced + first)


def _activations(step: _Step) -> Iterator[Change]:
    """Yield what is alive at each moment. Gradients that nothing has reduced yet are among it, unless they are added to those already held."""
    for m in step.moments[:-1]:
        live = m.live.end if m.kind == "reduce" else m.live.after if m.kind == "reduce root" else m.live.peak
        for category, size in live.items():
            if category != "gradient":
                yield from _during(m.time, category, max(0, size))
            elif step.units:
                yield from _during(m.time, "unsharded gradients", max(0, size))
            elif step.accumulate == 1:
                yield from _during(m.time, "gradients", max(0, size))


SOURCES = (
    _model_state,
    _gathered_parameters,
    _gradients,
    _accumulated_gradients,
    _all_gather_buffers,
    _reduce_scatter_buffers,
    _activations,
)
