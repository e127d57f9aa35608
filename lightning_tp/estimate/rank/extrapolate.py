"""Compute what a trace would be with more samples, from two traces: sizes, FLOPs and bytes grow by the same amount with each sample.

Where the tapes of two batch sizes have the same events but for their numbers, the numbers of a third lie on the line through both, and its
segments are counted anew from them, so that a peak may come at another moment. (One sample is often a special case: what is gathered along the
sequence needs no copy.) This is exact as long as the model does the same for any number of samples. Two traces do not prove that: `tune` traces
the configuration that it ranks first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_tp.estimate.rank.inputs import count_batch
from lightning_tp.estimate.rank.rank_model import RankModel
from lightning_tp.estimate.rank.settings import Settings
from lightning_tp.estimate.rank.trace_cache import TraceCache, settings_key
from lightning_tp.estimate.trace.step_trace import Op, StepTrace, Tape, replay
from lightning_tp.plan.checked import CheckedPlan


class NotLinear(Exception):
    """The model does something else with another number of samples."""


@dataclass(frozen=True)
class Line:
    """The line through the numbers of two batch sizes.

    Example:
        >>> Line(1, 2, 5)(10, 12)
        18
    """

    one: int
    two: int
    wanted: int  # the batch size that is asked for

    def __call__(self, a: int, b: int) -> int:
        """Return the number at the wanted batch size, from those at the two; `NotLinear` if it is no whole number."""
        if a == b:
            return a
        value, rest = divmod((b - a) * (self.wanted - self.one), self.two - self.one)
        if rest:
            raise NotLinear
        return a + value


def extrapolated(one: RankModel, two: RankModel, line: Line) -> RankModel:
    """Return the model at a third batch size, from traces with the two of the line; `NotLinear` if these do not do the same."""
    a, b = one.trace, two.trace
    _require(a.followed == b.followed and a.gradients == b.gradients and len(a.segments) == len(b.segments))
    _require(
        a.freed_after_forward.keys() == b.freed_after_forward.keys()
        and [e.tensor for e in a.forward] == [e.tensor for e in b.forward]
    )
    segments = replay([_tape(p, q, line) for p, q in zip(a.segments, b.segments)])
    freed = {label: line(n, b.freed_after_forward[label]) for label, n in a.freed_after_forward.items()}
    forward = tuple(_event(x, y, line) for x, y in zip(a.forward, b.forward))
    return replace(one, trace=StepTrace(segments, a.followed, a.gradients, forward, freed))


def _require(same: bool) -> None:
    if not same:
        raise NotLinear


def _tape(one: Tape, two: Tape, line: Line) -> Tape:
    _require((one.block, one.phase, one.representative, one.duplicate) == (two.block, two.phase, two.representative, two.duplicate))
    _require(len(one.events) == len(two.events))
    return replace(one, events=[_event(x, y, line) for x, y in zip(one.events, two.events)])


def _event(x: Any, y: Any, line: Line) -> Any:
    """Return the event on the line: whole numbers grow, and tuples item by item; all else has to be the same."""
    if x == y:
        return x
    _require(type(x) is type(y) and isinstance(x, (int, tuple)))
    if isinstance(x, int):
        return line(x, y)
    _require(len(x) == len(y))
    items = [_event(a, b, line) for a, b in zip(x, y)]
    found = type(x)(*items) if hasattr(x, "_fields") else tuple(items)
    if isinstance(found, Op) and found.kind == "product" and found.shape:
        _require(found.flops == 2 * math.prod(found.shape))  # else two sizes grow
    return found


@dataclass
class ExtrapolatingCache(TraceCache):
    """A cache that traces few batch sizes of the same inputs, and extrapolates the others."""

    exact: bool = False  # trace all of them
    extrapolated: set[int] = field(default_factory=set)  # batch sizes of which any was not traced
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
