"""The step of a rank as recorded: kernels, collectives and live bytes, in segments of a block each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch

from lightning_tp.estimate.trace.forward_log import ForwardEvent

Phase = Literal["forward", "recompute", "backward"]


class Op(NamedTuple):
    """A kernel, or some that are equal.

    Args:
        kind: "product", "attention", or "other" (bound by memory).
        name: of the operator.
        module: whose forward, or the backward of whose forward, it is.
        phase: "forward", "recompute" or "backward".
        flops: of one; multiply-adds count two. Causal attention counts in full.
        work: the part of `flops` that has to be done (half, for causal attention).
        bytes: read and written by one.
        shape: (batch, m, n, k) of a product; () otherwise.
        dtype: of its operands.
    """

    kind: str
    name: str
    module: str
    phase: Phase
    flops: int
    work: int
    bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Sent(NamedTuple):
    """A collective on the tensor-parallel axis, as a rank calls it.

    Args:
        kind: "all-reduce", "all-gather" or "reduce-scatter".
        bytes: of the whole tensor: what is summed, or what all shards are together.
        module: around which it happens.
        phase: as for `Op`.
    """

    kind: str
    bytes: int
    module: str
    phase: Phase


Label = tuple[str, str]  # (module, "kept" | "backward" | "gradient")


Levels = dict[Label, int]


Event = tuple[str, Any] | tuple[str, Any, int]  # ("op" | "fused", Op), ("sent", Sent), ("bytes", Label, change), ("end", None)


@dataclass
class Segment:
    """A stretch of the step.

    Args:
        block: that it is about; "" for what lies outside of blocks.
        phase: "forward" or "backward".
        like: the block that was followed for this one; None if it was followed itself.
        start, peak, end: bytes alive, by who made them: at its start, when they are most, and at its end (gradients of the block included).
        freed: bytes of the block's parameter gradients, which FSDP2 takes away at the end.
        again: it lies behind a block that was not followed, and is part of what is counted for that already.
        ops: how often each kernel runs.
        fused: the same with kernels between products run together, as a compiler does it.
        sent: how often each collective runs.
        tape: all that these were counted from, in order: bytes that begin (above 0) or end to be alive, kernels, collectives,
            and where `end` was.
    """

    block: str
    phase: Literal["forward", "backward"]
    like: str | None = None
    start: Levels = field(default_factory=dict)
    peak: Levels = field(default_factory=dict)
    end: Levels = field(default_factory=dict)
    freed: int = 0
    again: bool = False
    ops: Counter[Op] = field(default_factory=Counter)
    fused: Counter[Op] = field(default_factory=Counter)
    sent: Counter[Sent] = field(default_factory=Counter)
    tape: list[Event] = field(default_factory=list, repr=False)

    def kernel(self, op: Op) -> None:
        """One that runs alone, if nothing is compiled."""
        self.ops[op] += 1
        self.tape.append(("op", op))

    def compiled(self, op: Op) -> None:
        """One as a compiler makes it."""
        self.fused[op] += 1
        self.tape.append(("fused", op))

    def collective(self, sent: Sent) -> None:
        """One that is called."""
        self.sent[sent] += 1
        self.tape.append(("sent", sent))


@dataclass
class StepTrace:
    """What one step showed.

    Args:
        pieces: in their order; those of blocks that were not followed name the one that stands for them.
        followed: block -> the block that was followed for it (itself, if it was).
        gradients: bytes of each parameter's gradient, by name.
        steps: the modules of the forward in the order in which they ran.
        let_go: bytes that ended to be alive with the forward, by who made them: weights that autocast has cast and nothing has saved.
    """

    pieces: list[Segment]
    followed: dict[str, str]
    gradients: dict[str, int]
    steps: tuple[ForwardEvent, ...] = ()
    let_go: Levels = field(default_factory=dict)

    def of(self, piece: Segment) -> Segment:
        """The piece that was followed for this one."""
        return piece if piece.like is None else self._followed[piece.like, piece.phase]

    @cached_property
    def _followed(self) -> dict[tuple[str, str], Segment]:
        found: dict[tuple[str, str], Segment] = {}
        for p in self.pieces:
            if p.like is None:
                found.setdefault((p.block, p.phase), p)
        return found
