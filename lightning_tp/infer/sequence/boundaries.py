"""Follow features from the boundaries of regions on: in a region, every rank has the full stream, with a part of its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_tp.core.comm.state import WIDTH, I, R, State
from lightning_tp.infer.follow.features import shrunk
from lightning_tp.infer.follow.tracer import FeatureTrace, FeatureTracer
from lightning_tp.infer.sequence.label_hooks import LabelHooks, first_tensor, tensor_args
from lightning_tp.infer.sequence.sequence_plan import NotSequenceParallel, Region, SequencePlan
from lightning_tp.plan.plan import Plan
from lightning_tp.plan.rule import Rule
from lightning_tp.styles import Colwise

Inputs = dict[str, set[State]]  # column-wise layer -> the states in which it was given its input


@dataclass(frozen=True)
class Replanned:
    """A plan for a model whose regions are given a stream that each rank has a part of the gradient of."""

    plan: Plan
    trace: FeatureTrace  # of the run that it is written from
    mixed: frozenset[
        str
    ]  # parameters that met local and full activations before: their gradient is summed where they meet local ones


Replan = Callable[[Callable[[FeatureTracer], None]], Replanned]


def replan_from_boundaries(
    model: nn.Module, rules: Iterable[Rule], sequence: SequencePlan, replan: Replan
) -> tuple[Replanned, Inputs]:
    """Follow the features once more, from the boundaries of the regions on.

    Args:
        rules: of the plan without sequence parallelism, one for each module.
        replan: follows the features; it is given a function that puts labels on tensors, to call before a run.

    Raises:
        NotSequenceParallel: if the code can't work on a stream that each rank has a part of the gradient of.
    """
    runs: list[_BoundaryLabels] = []

    def prepare(tracer: FeatureTracer) -> None:
        for earlier in runs:
            earlier.close()
        runs.append(_BoundaryLabels(model, tracer, rules, sequence))

    try:
        found = replan(prepare)
    finally:
        for run in runs:
            run.close()
    if any(run.take_turns for run in runs):
        raise NotSequenceParallel("two streams take turns")  # the axis remembers the length of one sequence
    if found.trace.escaped:
        raise NotSequenceParallel("a partial gradient meets full activations", found.trace.escaped)
    return found, runs[-1].inputs


class _BoundaryLabels(LabelHooks):
    """Label tensors at the boundaries of regions, and of layers with an all-gathered output, while features are followed."""

    def __init__(self, model: nn.Module, tracer: FeatureTracer, rules: Iterable[Rule], sequence: SequencePlan) -> None:
        super().__init__(model, tracer)
        tracer.gathered = True
        self.inputs: Inputs = {}
        self.running = 0  # streams
        self.take_turns = False  # whether blocks of one stream ran inside of another
        for blocks in sequence.streams:
            self.hook(blocks[0], self._enter_stream, None)
            self.hook(blocks[-1], None, self._leave_stream)
        for region in sequence.regions.values():
            self.hook(region.name, partial(self._enter, region), partial(self._leave, region))
        for rule in rules:
            if isinstance(rule.style, Colwise):
                gathers = rule.style.output == I
                self.hook(rule.pattern, partial(self._note_input, rule.pattern), self._gather if gathers else None)

    def _enter_stream(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.take_turns |= self.running > 0
        self.running += 1

    def _leave_stream(self, module: nn.Module, args: Any, out: Any) -> None:
        self.running = max(self.running - 1, 0)

    def _enter(self, region: Region, module: nn.Module, args: Any, kwargs: Any) -> None:
        beside_shards = torch.zeros((), dtype=torch.int64)  # the label of what every rank has
        stream = [t for k, t in tensor_args(args, kwargs) if k in region.args]
        self.enter_region(region, stream, lambda t: beside_shards.expand(t.shape))
        self.tracer.deferring = region.reduces_at_return

    def _leave(self, region: Region, module: nn.Module, args: Any, out: Any) -> None:
        self.tracer.deferring = False
        self.leave_region()
        if region.reduces_at_return and (first := first_tensor(out)) is not None:
            self.relabel(first, None)

    def _note_input(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        label = self.tracer.shadow(args[0]).label if args else None
        state = I if label is None else WIDTH if bool(shrunk(label).any()) else R
        self.inputs.setdefault(name, set()).add(state)

    def _gather(self, module: nn.Module, args: Any, out: Any) -> None:
        self.relabel(out, None)
