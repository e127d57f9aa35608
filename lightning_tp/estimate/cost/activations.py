"""Count the live bytes of a traced step by category, as if every block had run.

Of repeated blocks the trace has two of each kind (`trace.repeated_blocks`). Here what a representative adds to the live bytes is added for each
block that it represents, in the forward, and taken away in the backward.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from lightning_tp.core.modules.blocks import enclosing
from lightning_tp.estimate.rank.rank_model import RankModel
from lightning_tp.estimate.trace.step_trace import Label, LiveBytes, Segment

ATTENTION_OPS = frozenset({"_softmax", "_safe_softmax", "bmm"})  # of attention that is written out


class LiveSegment(NamedTuple):
    """The live bytes of a segment by category (see `_Categories`), with those of blocks that did not run."""

    segment: Segment  # of the trace
    peak: Counter[str]  # when they are most
    end: Counter[str]  # when its computation has ended, and its block's gradients are not freed yet
    after: Counter[str]  # when the next segment starts


def live_segments(model: RankModel) -> list[LiveSegment]:
    """Return the live bytes of all segments of a step, in order."""
    category = _Categories(model)
    trace = model.trace
    last_forward = [s for s in trace.segments if s.phase == "forward"][-1]
    missing: Counter[str] = Counter()  # of blocks that did not run
    before: Counter[str] = Counter()  # at the start of the segment before
    found = []
    for segment in trace.segments:
        start, own_end = category.sums(segment.start), category.sums(segment.end)
        ran = trace.representative(segment)
        if segment.representative is None:
            peak, end = category.sums(segment.peak), own_end
        else:
            ran_start = category.sums(ran.start)
            peak = start + _difference(category.sums(ran.peak), ran_start)
            end = start + _difference(category.sums(ran.end), ran_start)
        peak, end = peak + missing, end + missing
        if segment.representative is not None:
            added = _difference(category.sums(ran.end), ran_start)
            added["gradient"] -= ran.freed
            missing.update(added)
            if segment.phase == "backward":  # the trace has freed the input that stood in
                own = _difference(own_end, start)
                own["gradient"] -= segment.freed
                missing.subtract(own)
        elif segment.duplicate:  # the representative's segment has it
            missing.subtract(_difference(own_end, before))
        before = start
        if segment is last_forward:
            missing.subtract(_freed_after_forward(model, category))
        found.append(LiveSegment(segment, peak, end, own_end + missing))
    return found


def _freed_after_forward(model: RankModel, category: _Categories) -> Counter[str]:
    """Count what autocast frees after the forward in blocks that did not run."""
    times = Counter(model.trace.copies.values())
    found: Counter[str] = Counter()
    for label, n in model.trace.freed_after_forward.items():
        block = enclosing(label.module, times)
        if block:
            found[category.of(label)] += n * times[block]
    return found


def _difference(a: Counter[str], b: Counter[str]) -> Counter[str]:
    """Subtract, keeping what is below 0, which `-` of Counters drops."""
    found = Counter(a)
    found.subtract(b)
    return found


class _Categories:
    """Tells which bytes are of attention, MLP, norms, residual, embedding, logits and loss, other, the backward, or a gradient."""

    def __init__(self, model: RankModel) -> None:
        self.classes = model.classes
        self.blocks = set(model.blocks)
        forward = [op for segment in model.trace.segments for op in segment.ops if op.phase != "backward"]
        self.attention = {op.module for op in forward if op.kind == "attention" or op.name in ATTENTION_OPS}
        self.products = {op.module for op in forward if op.kind == "product" and op.name not in ATTENTION_OPS}
        self._known: dict[Label, str] = {}

    def sums(self, live: LiveBytes) -> Counter[str]:
        """Sum live bytes by category."""
        found: Counter[str] = Counter()
        for label, n in live.items():
            if n:
                found[self.of(label)] += n
        return found

    def of(self, label: Label) -> str:
        """Return the category of what a module makes."""
        if label not in self._known:
            self._known[label] = self._category(label.module) if label.kind == "activation" else label.kind
        return self._known[label]

    def _category(self, module: str) -> str:
        if "norm" in self.classes.get(module, "").lower():
            return "norms"
        block = enclosing(module, self.blocks)
        if not block:
            if "embedding" in self.classes.get(module, "").lower():
                return "embedding"
            return "logits and loss" if module == "" or module in self.products else "other"
        if module == block:
            return "residual"
        child = f"{block}.{module[len(block) + 1 :].partition('.')[0]}"
        for category, modules in (("attention", self.attention), ("MLP", self.products)):
            if any(m == child or m.startswith(child + ".") for m in modules):
                return category
        return "residual"
