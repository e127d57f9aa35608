"""Compute what a trace would be with more samples, from two traces: sizes, FLOPs and bytes grow by the same amount with each sample.

Where the tapes of two batch sizes have the same events but for their numbers, the numbers of a third lie on the line through both, and its
segments are counted anew from them, so that a peak may come at another moment. (One sample is often a special case: what is gathered along the
sequence needs no copy.) This is exact as long as the model does the same for any number of samples. Two traces do not prove that: `tune` traces
the configuration that it ranks first.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from lightning_tp.estimate.rank.inputs import count_batch
from lightning_tp.estimate.rank.rank_model import RankModel
from lightning_tp.estimate.rank.settings import Settings
from lightning_tp.estimate.rank.trace_cache import TraceCache, settings_key
from lightning_tp.estimate.trace.forward_log import ForwardEvent
from lightning_tp.estimate.trace.step_trace import Alloc, CollectiveCall, Event, FusedOp, Op, StepTrace, Tape, replay
from lightning_tp.plan.checked import CheckedPlan


class NotLinear(Exception):
    """The model does something else with another number of samples."""


@dataclass(frozen=True)
class Line:
    """The line through the numbers of two batch sizes.

    Args:
        one, two: the batch sizes.
        wanted: the one that is asked for.

    Example:
        >>> Line(1, 2, 5)(10, 12)
        18
    """

    one: int
    two: int
    wanted: int

    def __call__(self, a: int, b: int) -> int:
        """Return the number at the wanted batch size.

        Args:
            a, b: the numbers at the two.

        Raises:
            NotLinear: if it is no whole number.
        """
        if a == b:
            return a
        value, rest = divmod((b - a) * (self.wanted - self.one), self.two - self.one)
        if rest:
            raise NotLinear
        return a + value


def extrapolated(one: RankModel, two: RankModel, line: Line) -> RankModel:
    """Return the model as traced with a third batch size.

    Args:
        one, two: traced with the two batch sizes of the line, the same in all else.
        line: which these are, and which is asked for.

    Raises:
        NotLinear: if the two do not do the same.
    """
    a, b = one.trace, two.trace
    _require(a.followed == b.followed and a.gradients == b.gradients and len(a.segments) == len(b.segments))
    _require(a.freed_after_forward.keys() == b.freed_after_forward.keys() and len(a.forward) == len(b.forward))
    segments = replay([_tape(p, q, line) for p, q in zip(a.segments, b.segments)])
    freed = {label: line(n, b.freed_after_forward[label]) for label, n in a.freed_after_forward.items()}
    forward = tuple(_forward_event(x, y, line) for x, y in zip(a.forward, b.forward))
    return replace(one, trace=StepTrace(segments, a.followed, a.gradients, forward, freed))


def _require(same: bool) -> None:
    if not same:
        raise NotLinear


def _tape(one: Tape, two: Tape, line: Line) -> Tape:
    _require((one.block, one.phase, one.representative, one.duplicate) == (two.block, two.phase, two.representative, two.duplicate))
    _require(len(one.events) == len(two.events))
    events = [x if x == y else _event(x, y, line) for x, y in zip(one.events, two.events)]
    return Tape(one.block, one.phase, one.representative, events, one.duplicate)


def _event(x: Event, y: Event, line: Line) -> Event:
    if isinstance(x, Alloc) and isinstance(y, Alloc):
        _require(x.label == y.label)
        return Alloc(x.label, line(x.change, y.change))
    if isinstance(x, Op) and isinstance(y, Op):
        return _op(x, y, line)
    if isinstance(x, FusedOp) and isinstance(y, FusedOp):
        return FusedOp(_op(x.op, y.op, line))
    if isinstance(x, CollectiveCall) and isinstance(y, CollectiveCall):
        _require(x._replace(bytes=0) == y._replace(bytes=0))
        return x._replace(bytes=line(x.bytes, y.bytes))
    raise NotLinear


def _op(x: Op, y: Op, line: Line) -> Op:
    _require(_without_numbers(x) == _without_numbers(y) and len(x.shape) == len(y.shape))
    shape = tuple(map(line, x.shape, y.shape))
    flops, work = line(x.flops, y.flops), line(x.work, y.work)
    if x.kind == "product" and x.shape:
        batch, m, n, k = shape
        _require(flops == 2 * batch * m * n * k)  # else two sizes grow
    return x._replace(flops=flops, work=work, bytes=line(x.bytes, y.bytes), shape=shape)


def _without_numbers(op: Op) -> Op:
    return op._replace(flops=0, work=0, bytes=0, shape=())


def _forward_event(x: ForwardEvent, y: ForwardEvent, line: Line) -> ForwardEvent:
    _require(x._replace(shape=(), bytes=0) == y._replace(shape=(), bytes=0) and len(x.shape) == len(y.shape))
    return x._replace(shape=tuple(map(line, x.shape, y.shape)), bytes=line(x.bytes, y.bytes))


@dataclass
class ExtrapolatingCache(TraceCache):
    """A cache that traces few batch sizes of the same inputs, and extrapolates the others.

    Args:
        exact: trace all of them.
        extrapolated: batch sizes of which any was not traced.
    """

    exact: bool = False
    extrapolated: set[int] = field(default_factory=set)
    _by_batch: dict[Any, dict[int, RankModel]] = field(default_factory=dict)

    def _trace(self, inputs: Any, plan: CheckedPlan, settings: Settings) -> RankModel:
        """Trace these inputs, or extrapolate from the two largest batch sizes below."""
        batch = count_batch(inputs).samples
        known = self._by_batch.setdefault(settings_key(settings), {})
        below = sorted(n for n in known if n < batch)[-2:]
        if len(below) == 2 and not self.exact:
            one, two = below
            try:
                found = extrapolated(known[one], known[two], Line(one, two, batch))
            except NotLinear:
                pass
            else:
                self.extrapolated.add(batch)
                return found
        known[batch] = super()._trace(inputs, plan, settings)
        return known[batch]

    def traced_anew(self) -> ExtrapolatingCache:
        """Return a cache with the same plans that traces every batch size."""
        return ExtrapolatingCache(self.model, self.inputs, self.loss_of, self.plan, self.step_costs, self._plans, exact=True)
