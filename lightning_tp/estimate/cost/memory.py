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
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from lightning_tp.core.modules.blocks import enclosing
from lightning_tp.estimate.cost.activations import LiveSegment, live_segments
from lightning_tp.estimate.rank.fsdp_units import Unit, units_of
from lightning_tp.estimate.rank.rank_model import RankModel
from lightning_tp.estimate.rank.settings import Precision

Kinds = Mapping[str, int]


@dataclass(frozen=True)
class MemorySnapshot:
    """The memory at one moment.

    Args:
        name: such as "backward of layers.79".
        kinds: bytes by category.
    """

    name: str
    kinds: Kinds

    @property
    def total(self) -> int:
        """Bytes of all categories."""
        return sum(self.kinds.values())


@dataclass(frozen=True)
class Memory:
    """What one rank holds, in bytes.

    Args:
        parameters, gradients, optimizer, buffers: from one step to the next (gradients: after the backward).
        activations: saved for the backward when the forward has ended, by category.
        peak: the moment with most.
        timeline: all moments of the step, in order.
    """

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    activations: Kinds
    peak: MemorySnapshot
    timeline: tuple[MemorySnapshot, ...]


def memory_of(model: RankModel, precision: Precision, dp: int, *, optimizer: int, scratch: int, accumulate: int = 1) -> Memory:
    """Return the memory of a rank over a step.

    Args:
        model: traced.
        precision: of the training.
        dp: data-parallel ranks.
        optimizer: bytes of its state.
        scratch: bytes that its step needs temporarily.
        accumulate: micro-batches of a step; the last one is shown.
    """
    live = live_segments(model)
    units = units_of(model, precision, dp) if dp > 1 else {}
    step = _Step(model, units, tuple(_moments(live, units)), optimizer, scratch, accumulate)
    changes = [change for source in SOURCES for change in source(step)]
    timeline = tuple(
        MemorySnapshot(moment.name, kinds) for moment, kinds in zip(step.moments, _cumulated(changes, len(step.moments)))
    )
    saved = [s.after for s in live if s.segment.phase == "forward"][-1]
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


def _cumulated(changes: list[Change], moments: int) -> list[dict[str, int]]:
    """Return the bytes of each category at each moment."""
    at: list[list[Change]] = [[] for _ in range(moments + 1)]
    for change in changes:
        at[change.time].append(change)
    held: dict[str, int] = {}
    found = []
    for time in range(moments):
        for change in at[time]:
            held[change.category] = held.get(change.category, 0) + change.bytes
        found.append({category: n for category, n in held.items() if n > 0})
    return found


# -------------------------------------------------------------------------------------------------------------- the moments


class _Moment(NamedTuple):
    """A moment of the step.

    Args:
        name: for reading.
        kind: a segment runs; a unit's gradients are reduce-scattered; those of the root; or the optimizer steps.
        live: of the segment.
    """

    name: str
    kind: Literal["run", "reduce", "reduce root", "optimizer"]
    live: LiveSegment

    @property
    def block(self) -> str:
        """The block that runs; "" outside of blocks."""
        return self.live.segment.block

    @property
    def in_backward(self) -> bool:
        """Whether the segment is part of the backward."""
        return self.live.segment.phase == "backward"


def _moments(live: list[LiveSegment], units: Mapping[str, Unit]) -> Iterator[_Moment]:
    for found in live:
        segment = found.segment
        if segment.duplicate:
            continue
        where = f" of {segment.block}" if segment.block else " pass, outside the blocks"
        yield _Moment(f"{segment.phase}{where}", "run", found)
        if segment.phase == "backward" and segment.block and segment.block in units and units[segment.block].reduced:
            yield _Moment(f"gradient reduction of {segment.block}", "reduce", found)
    if "" in units and units[""].reduced:
        yield _Moment("gradient reduction, outside the blocks", "reduce root", live[-1])
    yield _Moment("step of the optimizer", "optimizer", live[-1])


@dataclass(frozen=True)
class _Step:
    """A step, as all sources of memory see it.

    Args:
        model: on this rank.
        units: FSDP2's; none with one data-parallel rank.
        moments: in order; the last one is the step of the optimizer.
        optimizer, scratch: bytes, see `memory_of`.
        accumulate: micro-batches.
    """

    model: RankModel
    units: Mapping[str, Unit]
    moments: tuple[_Moment, ...]
    optimizer: int
    scratch: int
    accumulate: int

    @property
    def end(self) -> int:
        """The time of the optimizer's step."""
        return len(self.moments) - 1

    @property
    def backward_end(self) -> int:
        """The time after all segments and the reduce-scatters of blocks."""
        return self.end - any(m.kind == "reduce root" for m in self.moments)

    @property
    def gradient_bytes(self) -> int:
        """Gradients of all parameters as held after the backward."""
        return sum(p.bytes for p in self.model.trained)

    @property
    def units_forward(self) -> list[str]:
        """The units of blocks in the order of the forward."""
        return [m.block for m in self.moments if m.kind == "run" and not m.in_backward and m.block and m.block in self.units]

    def runs(self) -> Iterator[tuple[int, _Moment]]:
        """Yield (time, moment) of segments."""
        return ((time, m) for time, m in enumerate(self.moments) if m.kind == "run")

    def unit_of(self, moment: _Moment) -> Unit | None:
        """Return the unit of the block that runs; None outside of blocks, and where FSDP2 has no unit of its own for it."""
        return self.units.get(moment.block) if moment.block else None


# -------------------------------------------------------------------------------------------------------------- the sources


def _model_state(step: _Step) -> Iterator[Change]:
    yield Change(0, "parameters", sum(p.bytes for p in step.model.params))
    yield Change(0, "optimizer", step.optimizer)
    yield Change(0, "buffers", step.model.buffer_bytes)
    yield Change(step.end, "optimizer's scratch", step.scratch)


def _gathered_parameters(step: _Step) -> Iterator[Change]:
    """Yield the unsharded parameters of the unit that runs, and the root's through forward and backward."""
    if "" in step.units:
        yield Change(0, "gathered parameters", step.units[""].gathered)
        yield Change(step.backward_end, "gathered parameters", -step.units[""].gathered)
    for time, moment in step.runs():
        unit = step.unit_of(moment)
        if unit is not None:
            yield from _during(time, "gathered parameters", unit.gathered)


def _gradients(step: _Step) -> Iterator[Change]:
    """Yield the gradients as they are held between steps: with FSDP2, each unit's shard from its reduce-scatter on."""
    held = 0
    for change in _fsdp_gradients(step) if step.units else _block_gradients(step):
        held += change.bytes
        yield change
    yield Change(step.end, "gradients", step.gradient_bytes - held)


def _fsdp_gradients(step: _Step) -> Iterator[Change]:
    for time, moment in step.runs():
        unit = step.unit_of(moment)
        if moment.in_backward and unit is not None:
            yield Change(time + 1, "gradients", unit.gradients)
    if step.backward_end < step.end:
        yield Change(step.backward_end, "gradients", step.units[""].gradients)


def _block_gradients(step: _Step) -> Iterator[Change]:
    """Yield each block's from the end of its backward on; with accumulation, all are there from the micro-batches before."""
    if step.accumulate > 1:
        yield Change(0, "gradients", step.gradient_bytes)
        return
    by_block: Counter[str] = Counter()
    blocks = set(step.model.blocks)
    for p in step.model.trained:
        by_block[enclosing(p.name, blocks)] += math.prod(p.tp_shape) * p.dtype.itemsize
    for time, moment in step.runs():
        if moment.in_backward and moment.block:
            yield Change(time + 1, "gradients", by_block[moment.block])


def _accumulated_gradients(step: _Step) -> Iterator[Change]:
    """Yield the unsharded gradients of earlier micro-batches, which FSDP2 keeps until each unit's reduce-scatter."""
    if step.accumulate == 1 or not step.units:
        return
    left = sum(unit.reduced for unit in step.units.values())
    yield Change(0, "unsharded gradients", left)
    for time, moment in enumerate(step.moments):
        if moment.kind == "reduce":
            left -= step.units[moment.block].reduced
            yield Change(time + 1, "unsharded gradients", -step.units[moment.block].reduced)
    yield Change(step.backward_end, "unsharded gradients", -left)


def _all_gather_buffers(step: _Step) -> Iterator[Change]:
    """Yield the flat tensors that parameters are gathered into: the unit's own, in the backward that of the next one, which is prefetched."""
    prefetched = {unit: before for before, unit in pairwise(step.units_forward)}
    for time, moment in enumerate(step.moments):
        if moment.kind not in ("run", "reduce") or step.unit_of(moment) is None:
            continue
        name = prefetched.get(moment.block) if moment.in_backward else moment.block
        if name is not None:
            yield from _during(time, "FSDP2 buffers", step.units[name].gathered)


def _reduce_scatter_buffers(step: _Step) -> Iterator[Change]:
    """Yield the flat inputs of reduce-scatters: while a unit's backward runs, that of the unit before it in the backward; then its own."""
    order = step.units_forward
    pending = {unit: behind for unit, behind in pairwise(order)}
    for time, moment in enumerate(step.moments):
        if moment.kind == "reduce":
            yield from _during(time, "FSDP2 buffers", step.units[moment.block].reduced)
        elif moment.kind == "run" and moment.in_backward and moment.block in pending:
            yield from _during(time, "FSDP2 buffers", step.units[pending[moment.block]].reduced)
        elif moment.kind == "reduce root":
            first = step.units[order[0]].reduced if order else 0
            yield from _during(time, "FSDP2 buffers", step.units[""].reduced + first)


def _activations(step: _Step) -> Iterator[Change]:
    """Yield what is alive at each moment. Gradients that nothing has reduced yet are among it, unless they are added to those already held."""
    gradients = "unsharded gradients" if step.units else "gradients"
    for time, moment in enumerate(step.moments):
        if moment.kind == "optimizer":
            continue
        live = {"run": moment.live.peak, "reduce": moment.live.end, "reduce root": moment.live.after}[moment.kind]
        for category, size in live.items():
            if category != "gradient":
                yield from _during(time, category, max(0, size))
            elif step.units or step.accumulate == 1:
                yield from _during(time, gradients, max(0, size))


SOURCES = (
    _model_state,
    _gathered_parameters,
    _gradients,
    _accumulated_gradients,
    _all_gather_buffers,
    _reduce_scatter_buffers,
    _activations,
)
