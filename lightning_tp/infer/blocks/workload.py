"""What a plan is searched for: a model, a call that runs it, and how many ranks are to share it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_tp.core.ops.attention import readable_attention
from lightning_tp.infer.blocks.identical import Caller, identical_blocks
from lightning_tp.infer.blocks.repeated import RepeatedBlocks, skip_copies
from lightning_tp.infer.calls.recorder import CallRecorder, untracked_size_reads
from lightning_tp.infer.follow.run import leaves, run
from lightning_tp.infer.follow.trace import FeatureTrace
from lightning_tp.infer.follow.tracer import FeatureTracer

Key = tuple[str, int]  # (parameter, dim)
RecorderOf = Callable[[FeatureTracer], CallRecorder]


@dataclass(frozen=True)
class TracedRun:
    """One traced run of a model."""

    trace: FeatureTrace  # the features, and what became of them
    tracer: FeatureTracer  # knows what each tensor of the run is
    outputs: tuple[Tensor, ...]  # the features of what the model returned, but for tensors that have none
    ran: frozenset[str]  # names of the repeated blocks that were not skipped


@dataclass(frozen=True)
class Workload:
    """A model, a call that runs it, `call(model, inputs)`, and the number of ranks that are to share it. Runs leave its modules as they are."""

    model: nn.Module
    call: Caller
    inputs: Any
    tp: int
    blocks: RepeatedBlocks = field(default_factory=RepeatedBlocks)  # of which one of each kind is traced

    def with_identical_blocks(self) -> Workload:
        """Return the same, where of blocks that do the same only one is traced; the model is run once to find them."""
        return replace(self, blocks=identical_blocks(self.model, self.call, self.inputs))

    def trace(self, whole: set[Key], shared: dict[Key, Tensor], recorder: RecorderOf | None = None) -> TracedRun:
        """Run the model, its attention in operations that can be traced, and follow the features of its weights.

        Args:
            whole: weights whose features are not followed: every rank has all of them.
            shared: which features of a weight every rank has.
            recorder: makes a mode that sees the calls of torch functions.
        """
        ran: set[str] = set()
        once = partial(skip_copies, self.model, self.blocks, ran=ran)
        with readable_attention(self.model):
            trace, out, tracer = run(self.model, self.call, self.inputs, whole, shared, recorder, during=once)
        labels = [tracer.shadow(t).label for t in leaves(out)]
        return TracedRun(trace, tracer, tuple(x for x in labels if x is not None), frozenset(ran))

    def untracked_reads(
        self, whole: set[Key], shared: dict[Key, Tensor], make: RecorderOf, recorder: CallRecorder, tracer: FeatureTracer
    ) -> set[Any]:
        """Return the places where code computes with the size of a shard unseen; see `untracked_size_reads`."""
        once = partial(skip_copies, self.model, self.blocks)
        with readable_attention(self.model):
            return untracked_size_reads(self.model, self.call, self.inputs, whole, shared, make, once, recorder, tracer)
