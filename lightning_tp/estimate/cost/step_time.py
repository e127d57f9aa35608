"""Add up how long a step takes: kernels, collectives, what overlaps, and what is exposed.

A segment of the step (a block forward, a block backward) can't take less than the CPU needs to launch its kernels. TP communication is not
overlapped. FSDP2's all-gather of the next unit and its reduce-scatter of the one before run beside the computation of a block: with overlap a
segment takes the longer of the two. What these read and write (`Hardware.fsdp_traffic`) slows the kernels beside them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import NamedTuple

from lightning_tp.estimate.cost.collectives import PER_STEP, Collective
from lightning_tp.estimate.cost.hardware import Hardware
from lightning_tp.estimate.cost.roofline import collective_seconds, in_node, kernel_seconds
from lightning_tp.estimate.rank.rank_model import RankModel
from lightning_tp.estimate.trace.step_trace import Segment


@dataclass(frozen=True)
class Time:
    """Seconds of one optimizer step on a rank.

    `products`, `attention`, `other`, `tp`, `dp_exposed`, `slowed`, `host` and `optimizer` add up to `step`.
    """

    step: float = 0.0  # with overlap
    without_overlap: float = 0.0  # one after the other: with `dp` instead of `dp_exposed`
    # products, attention, other: kernels, by kind
    products: float = 0.0
    attention: float = 0.0
    other: float = 0.0
    tp: float = 0.0  # communication on the tensor-parallel axis
    dp: float = 0.0  # communication on the data-parallel axis
    dp_exposed: float = 0.0  # the part of `dp` that no computation overlaps
    slowed: float = 0.0  # what kernels take longer because FSDP2's communication beside them uses the memory bandwidth
    optimizer: float = 0.0  # its step
    host: float = 0.0  # CPU launch overhead: what launching takes longer than the kernels run

    def plus(self, other: Time, times: int = 1) -> Time:
        """Return this and `times` the other, part by part."""
        return Time(**{f.name: getattr(self, f.name) + times * getattr(other, f.name) for f in fields(Time)})


def time_of(
    model: RankModel,
    collectives: Iterable[Collective],
    hw: Hardware,
    tp: int,
    *,
    optimizer_bytes: int,
    accumulate: int = 1,
    compile: bool = False,
) -> Time:
    """Return the time of a step, whose optimizer reads and writes `optimizer_bytes`; with `compile`, blocks are compiled."""
    bandwidth = hw.memory_bandwidth * hw.memory_efficiency * hw.sustained
    optimizer = optimizer_bytes / bandwidth
    fsdp: dict[tuple[str, str], float] = defaultdict(float)  # seconds in a micro-batch beside each (block, phase)
    slowed: dict[tuple[str, str], float] = defaultdict(float)  # seconds by which that slows its kernels
    dp = exposed = tp_once = 0.0
    for c in collectives:
        seconds = collective_seconds(hw, c.kind, c.bytes, c.ranks, in_node(hw, c.axis, tp, c.ranks)) * c.count
        if c.axis == "tp":
            tp_once += seconds if c.where in PER_STEP else 0  # the others are in the segments
        elif c.where in model.blocks:
            dp += seconds
            fsdp[c.where, c.phase] += seconds / accumulate
            slowed[c.where, c.phase] += c.bytes * c.count * hw.fsdp_traffic / bandwidth / accumulate
        else:
            dp += seconds
            exposed += seconds
    segments = model.trace.segments
    work = {id(s): _work_of(s, hw, tp, compile) for s in segments if s.representative is None}
    not_prefetched = (next((s.block for s in segments if s.block), ""), "forward")
    micro_batch = Time()
    for segment in segments:
        if not segment.duplicate:
            key = (segment.block, segment.phase)
            ran = work[id(model.trace.representative(segment))]
            micro_batch = micro_batch.plus(_segment_time(ran, fsdp[key], slowed[key], hw, prefetched=key != not_prefetched))
    rest = exposed + tp_once + optimizer
    return Time().plus(micro_batch, accumulate).plus(Time(rest, rest, tp=tp_once, dp=dp, dp_exposed=exposed, optimizer=optimizer))


class _Work(NamedTuple):
    """What a segment does on its own: seconds of kernels by kind, seconds of TP communication, and the number of launches."""

    kernels: dict[str, float]
    tp: float
    launches: int


def _work_of(segment: Segment, hw: Hardware, tp: int, compile: bool) -> _Work:
    ops = segment.fused if compile and segment.block else segment.ops
    kernels: dict[str, float] = defaultdict(float)
    for op, n in ops.items():
        kernels[op.kind] += n * kernel_seconds(hw, op)
    group = in_node(hw, "tp", tp, tp)
    sent = sum(n * collective_seconds(hw, c.kind, c.bytes, tp, group) for c, n in segment.collectives.items())
    return _Work(kernels, sent, sum(ops.values()) + sum(segment.collectives.values()))


def _segment_time(work: _Work, fsdp: float, slowed: float, hw: Hardware, *, prefetched: bool) -> Time:
    """Return the time of a segment beside which FSDP2 communicates; where that is not prefetched, the kernels wait for it."""
    busy = sum(work.kernels.values()) + work.tp + slowed
    launching = work.launches * hw.host_s
    host = max(0.0, launching - busy) if hw.device != "cpu" else launching
    hidden = min(fsdp, busy + host) if prefetched else 0.0
    return Time(
        step=busy + host + fsdp - hidden,
        without_overlap=busy + host + fsdp,
        products=work.kernels.get("product", 0.0),
        attention=work.kernels.get("attention", 0.0),
        other=work.kernels.get("other", 0.0),
        tp=work.tp,
        dp_exposed=fsdp - hidden,
        slowed=slowed,
        host=host,
    )
