"""What a trace would be with more samples, from two traces: sizes, FLOPs and bytes grow by as much with each sample.

A piece of a trace keeps its tape: each tensor that begins and ends to be alive, each kernel, each collective, in order. Where the tapes of two
batches have the same events, but for their numbers, those of another batch are on the line through both; what is counted is counted anew from
them, so that a peak may be at another moment. (One sample is often a case of its own: what is gathered along the sequence needs no copy.)
This is exact as long as the model does the same for any number of samples. Two traces do not prove that: `tune` traces the choice that
it puts first as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_tp.estimate.rank.inputs import counted
from lightning_tp.estimate.rank.rank_model import RankModel
from lightning_tp.estimate.rank.settings import Settings
from lightning_tp.estimate.rank.trace_cache import TraceCache
from lightning_tp.estimate.trace.forward_log import ForwardEvent
from lightning_tp.estimate.trace.step_trace import Event, Levels, Op, Segment, Sent, StepTrace
from lightning_tp.plan.plan import Plan


class NotLinear(Exception):
    """The model does something else with other numbers of samples."""


@dataclass(frozen=True)
class Line:
    """Through the numbers of two batches.

    Args:
        one, two: the batches.
        at: the one that is asked for.

    Example:
        >>> Line(1, 2, 5)(10, 12)
        18
    """

    one: int
    two: int
    at: int

    def __call__(self, a: int, b: int) -> int:
        """The number at the batch, of those at the two.

        Raises:
            NotLinear: if that is no whole number.
        """
        if a == b:
            return a
        value, rest = divmod((b - a) * (self.at - self.one), self.two - self.one)
        if rest:
            raise NotLinear
        return a + value


@dataclass
class _Replay:
    """Counts the pieces of a trace from their tapes."""

    levels: Levels = field(default_factory=dict)
    total: int = 0

    def piece(self, like: Segment, tape: list[Event], freed: int) -> Segment:
        """The next one."""
        new = Segment(like.block, like.phase, like.like, dict(self.levels), dict(self.levels), {}, freed, like.again)
        most, total, at, end = self.total, self.total, -1, len(tape)
        for i, event in enumerate(tape):
            if event[0] == "bytes":
                total += event[2]  # type: ignore[misc]
                if total > most:
                    most, at = total, i
            elif event[0] == "end":
                end = i
        levels = self.levels
        for i, event in enumerate(tape):
            kind, what = event[:2]
            if kind == "bytes":
                levels[what] = levels.get(what, 0) + event[2]  # type: ignore[misc]
                if i == at:
                    new.peak = dict(levels)
            elif kind == "op":
                new.ops[what] += 1
            elif kind == "fused":
                new.fused[what] += 1
            elif kind == "sent":
                new.sent[what] += 1
            elif i == end:
                new.end = dict(levels)
        self.total = total
        return new


def scaled(one: RankModel, two: RankModel, line: Line) -> RankModel:
    """The world of a third batch.

    Args:
        one, two: traced with the two batches of the line, alike in all else.
        line: which batches these are, and which is asked for.

    Raises:
        NotLinear: if the two do not do the same.
    """
    a, b = one.trace, two.trace
    if a.followed != b.followed or a.gradients != b.gradients or len(a.pieces) != len(b.pieces):
        raise NotLinear
    replay = _Replay()
    pieces = []
    for p, q in zip(a.pieces, b.pieces):
        if (p.block, p.phase, p.like, p.again, len(p.tape)) != (q.block, q.phase, q.like, q.again, len(q.tape)):
            raise NotLinear
        pieces.append(replay.piece(p, list(_events(p.tape, q.tape, line)), line(p.freed, q.freed)))
    if a.let_go.keys() != b.let_go.keys():
        raise NotLinear
    let_go = {label: line(n, b.let_go[label]) for label, n in a.let_go.items()}
    return replace(one, trace=StepTrace(pieces, a.followed, a.gradients, tuple(_steps(a.steps, b.steps, line)), let_go))


def _steps(one: tuple[ForwardEvent, ...], two: tuple[ForwardEvent, ...], line: Line) -> Iterator[ForwardEvent]:
    if len(one) != len(two):
        raise NotLinear
    for x, y in zip(one, two):
        if (x.what, x.module, x.name, len(x.shape), x.tensor) != (y.what, y.module, y.name, len(y.shape), y.tensor):
            raise NotLinear
        yield x._replace(shape=tuple(map(line, x.shape, y.shape)), bytes=line(x.bytes, y.bytes))


def _events(one: list[Event], two: list[Event], line: Line) -> Iterator[Event]:
    for x, y in zip(one, two):
        if x == y:
            yield x
        elif x[0] != y[0]:
            raise NotLinear
        elif x[0] == "bytes":
            if x[1] != y[1]:
                raise NotLinear
            yield ("bytes", x[1], line(x[2], y[2]))  # type: ignore[misc]
        else:
            yield (x[0], _between(x[1], y[1], line))


def _between(x: Any, y: Any, line: Line) -> Op | Sent:
    if isinstance(x, Sent):
        if (x.kind, x.module, x.phase) != (y.kind, y.module, y.phase):
            raise NotLinear
        return x._replace(bytes=line(x.bytes, y.bytes))
    alike = (x.kind, x.name, x.module, x.phase, x.dtype, len(x.shape)) == (y.kind, y.name, y.module, y.phase, y.dtype, len(y.shape))
    if not alike:
        raise NotLinear
    shape = tuple(map(line, x.shape, y.shape))
    flops, work = line(x.flops, y.flops), line(x.work, y.work)
    if x.kind == "product" and x.shape and flops != 2 * shape[0] * shape[1] * shape[2] * shape[3]:  # two sizes grow
        raise NotLinear
    return x._replace(flops=flops, work=work, bytes=line(x.bytes, y.bytes), shape=shape)


@dataclass
class ScalingTracer(TraceCache):
    """Traces few batches of the same inputs, and computes what the others would be.

    Args:
        exact: trace all of them.
        computed: batches of which any was not traced.
    """

    exact: bool = False
    computed: set[int] = field(default_factory=set)
    _traced: dict[Any, dict[int, RankModel]] = field(default_factory=dict)

    def trace(self, inputs: Any, plan: Plan, settings: Settings, sequence_parallel: bool) -> RankModel:
        """As it is, or of the two largest batches that are smaller."""
        batch = counted(inputs)[0]
        of = self._traced.setdefault(self.kind(settings, sequence_parallel), {})
        below = sorted(n for n in of if n < batch)[-2:]
        if len(below) == 2 and not self.exact:
            try:
                found = scaled(of[below[0]], of[below[1]], Line(below[0], below[1], batch))
            except NotLinear:
                pass
            else:
                self.computed.add(batch)
                return found
        of[batch] = super().trace(inputs, plan, settings, sequence_parallel)
        return of[batch]

    def as_it_is(self) -> None:
        """Trace every batch from here on."""
        self.exact = True
        self._worlds.clear()
        self._wholes.clear()
