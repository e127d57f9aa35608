"""Hold a training step as recorded on one rank: segments of a block each, with their kernels, collectives and live bytes.

A segment keeps its tape: every tensor that starts or ends being alive, every kernel and every collective, in order. All its other numbers are
counted from that tape by `replay`, for a tape that was recorded and for one that `rank.extrapolate` has computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Literal, NamedTuple

import torch

from lightning_tp.estimate.trace.forward_log import ForwardEvent

Phase = Literal["forward", "recompute", "backward"]


class Op(NamedTuple):
    """A kernel."""

    kind: str  # "product" (a matmul or convolution), "attention", or "other" (bound by memory bandwidth)
    name: str  # of the operator
    module: str  # whose forward, or the backward of whose forward, it is
    phase: Phase  # "forward", "recompute" or "backward"
    flops: int  # a multiply-add counts as two; causal attention counts in full
    work: int  # the part of `flops` that has to be computed (half of them for causal attention)
    bytes: int  # read and written
    shape: tuple[int, ...]  # (batch, m, n, k) of a matmul; () otherwise
    dtype: torch.dtype  # of its first operand


class FusedOp(NamedTuple):
    """A kernel as a compiler makes it: a matmul as it is, or all that stands between two of them."""

    op: Op


class CollectiveCall(NamedTuple):
    """A collective over the tensor-parallel axis."""

    kind: Literal["all-reduce", "all-gather", "reduce-scatter"]
    bytes: int  # of the full tensor: what is reduced, or all shards together
    module: str  # that calls it
    phase: Phase  # as in `Op`


class Label(NamedTuple):
    """Who made a tensor, and what it is."""

    module: str  # that made it; of a gradient, the name of the parameter
    # "activation" (made in the forward or when recomputed), "backward" (made there) or "gradient" (of a parameter)
    kind: Literal["activation", "backward", "gradient"]


LiveBytes = dict[Label, int]


class Alloc(NamedTuple):
    """Bytes that start being alive (above 0), or end (below 0)."""

    label: Label
    change: int


class End(NamedTuple):
    """The end of a block's computation; what follows on its tape frees the block's gradients."""


Event = Alloc | Op | FusedOp | CollectiveCall | End


@dataclass(frozen=True)
class Tape:
    """The events of one stretch of the step, in order: a block forward, a block backward, or what lies between."""

    block: str  # that runs; "" outside of blocks
    phase: Literal["forward", "backward"]  # "forward" or "backward"; what is recomputed is part of the backward
    representative: str | None = None  # the block that ran instead of this one; None if this one ran
    events: list[Event] = field(default_factory=list, repr=False)  # in order
    duplicate: bool = False  # whether it follows a block that did not run, and its kernels are part of the representative's segment


@dataclass(frozen=True)
class Segment(Tape):
    """A tape with all that is counted from it."""

    # start, peak, end: live bytes at its start, when they are most, and when its computation has ended
    start: LiveBytes = field(default_factory=dict)
    peak: LiveBytes = field(default_factory=dict)
    end: LiveBytes = field(default_factory=dict)
    freed: int = 0  # bytes of the block's parameter gradients, which FSDP2 reduces and frees at the end
    ops: Counter[Op] = field(default_factory=Counter)  # how often each kernel runs in eager mode
    fused: Counter[Op] = field(default_factory=Counter)  # how often each runs when compiled
    collectives: Counter[CollectiveCall] = field(default_factory=Counter)  # how often each runs


@dataclass
class StepTrace:
    """What one step showed."""

    segments: list[Segment]  # in order; those of blocks that did not run name the block that ran instead
    followed: dict[str, str]  # block -> the block that ran instead of it (itself, if it ran)
    gradients: dict[str, int]  # bytes of each parameter's gradient, by name
    forward: tuple[ForwardEvent, ...] = ()  # the order of the modules' forwards
    # bytes that autocast frees after the forward: weights that it has cast and nothing has saved
    freed_after_forward: LiveBytes = field(default_factory=dict)

    def representative(self, segment: Segment) -> Segment:
        """Return the segment that ran instead of this one; itself, if it ran."""
        return segment if segment.representative is None else self._ran[segment.representative, segment.phase]

    @cached_property
    def _ran(self) -> dict[tuple[str, str], Segment]:
        found: dict[tuple[str, str], Segment] = {}
        for segment in self.segments:
            if segment.representative is None:
                found.setdefault((segment.block, segment.phase), segment)
        return found

    @property
    def copies(self) -> dict[str, str]:
        """Block that did not run -> the block that ran instead."""
        return {block: ran for block, ran in self.followed.items() if block != ran}


def replay(tapes: Iterable[Tape]) -> list[Segment]:
    """Count the segments of a step from their tapes.

    Example:
        >>> x = Label("layer", "activation")
        >>> first, second = replay(
        ...     [
        ...         Tape("", "forward", events=[Alloc(x, 8), Alloc(x, 4), Alloc(x, -4), End()]),
        ...         Tape("", "backward", events=[Alloc(x, -8), End()]),
        ...     ]
        ... )
        >>> [sum(levels.values()) for levels in (first.start, first.peak, first.end, second.end)]
        [0, 12, 8, 0]
    """
    live: LiveBytes = {}
    segments = []
    for tape in tapes:
        segment = _counted(tape, live)
        segments.append(segment)
        live = _after(tape.events, live)
    return segments


def _counted(tape: Tape, start: LiveBytes) -> Segment:
    events = tape.events
    changes = (event.change if isinstance(event, Alloc) else 0 for event in events)
    totals = list(accumulate(changes, initial=sum(start.values())))  # before each event, and after the last one
    end_at = max((i for i, event in enumerate(events) if isinstance(event, End)), default=len(events))
    return Segment(
        tape.block,
        tape.phase,
        tape.representative,
        events,
        tape.duplicate,
        start=start,
        peak=_after(events[: totals.index(max(totals))], start),
        end=_after(events[:end_at], start),
        freed=totals[end_at] - totals[-1],
        ops=Counter(event for event in events if isinstance(event, Op)),
        fused=Counter(event.op for event in events if isinstance(event, FusedOp)),
        collectives=Counter(event for event in events if isinstance(event, CollectiveCall)),
    )


def _after(events: Iterable[Event], live: LiveBytes) -> LiveBytes:
    live = dict(live)
    for event in events:
        if isinstance(event, Alloc):
            live[event.label] = live.get(event.label, 0) + event.change
    return live
