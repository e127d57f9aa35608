"""Label tensors at the boundaries of blocks and regions while a model runs, and follow features from there on.

In a region every rank has the full stream, with a part of its gradient. What hooks do is not seen as something that the model does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tp._compat import unobserved
from lightning_tp.core.comm.state import WIDTH, I, R, State
from lightning_tp.infer.follow.features import shrunk
from lightning_tp.infer.follow.trace import FeatureTrace, TensorFacts
from lightning_tp.infer.follow.tracer import FeatureTracer
from lightning_tp.infer.sequence.sequence_plan import Arg, NotSequenceParallel, Region, SequencePlan
from lightning_tp.plan.plan import Plan
from lightning_tp.plan.rule import Rule
from lightning_tp.styles import Colwise

Inputs = dict[str, set[State]]  # column-wise layer -> the states in which it was given its input


@dataclass(frozen=True)
class Replanned:
    """A plan for a model whose regions are given a stream that each rank has a part of the gradient of."""

    plan: Plan
    trace: FeatureTrace  # of the run that it is written from
    mixed: set[
        str
    ]  # parameters that met sharded and full activations before: their gradient is summed where they meet sharded ones


Replan = Callable[[Callable[[FeatureTracer], None]], Replanned]


class LabelHooks:
    """Hooks for one run, after which the model has none. While a region runs, the tensors by which a stream arrives have another label."""

    def __init__(self, model: nn.Module, tracer: FeatureTracer) -> None:
        self.model, self.tracer = model, tracer
        self.entered: list[tuple[Region, list[tuple[Tensor, TensorFacts]]]] = []  # regions that run, what is known of their inputs

    def hook(self, name: str, enter: Callable[..., None] | None, leave: Callable[..., None] | None) -> None:
        """Call `enter(module, args, kwargs)` before a module runs, and `leave(module, args, out)` after."""
        module = self.model.get_submodule(name)
        if enter is not None:
            module.register_forward_pre_hook(partial(_quietly, enter), with_kwargs=True)
        if leave is not None:
            module.register_forward_hook(partial(_quietly, leave))

    def relabel(self, t: Tensor, label: Tensor | None) -> None:
        """Give a tensor another label."""
        self.tracer.put(t, TensorFacts(label, None, self.tracer.shadow(t).grad))

    def enter_region(self, region: Region, stream: list[Tensor], label_of: Callable[[Tensor], Tensor | None]) -> None:
        """Give the tensors of a stream the labels that code in a region is to see."""
        tensors = {id(t): t for t in stream}.values()
        self.entered.append((region, [(t, self.tracer.shadow(t)) for t in tensors]))
        for t in tensors:
            self.relabel(t, label_of(t))

    def leave_region(self) -> None:
        """Give them their own labels again."""
        for t, facts in self.entered.pop()[1]:
            self.tracer.put(t, facts)


def _quietly(hook: Callable[..., None], *args: Any) -> None:
    with unobserved():
        hook(*args)


def tensor_args(args: Any, kwargs: Any) -> list[tuple[Arg, Tensor]]:
    """Return (argument, tensor) of what a module is given, without what is in containers."""
    pairs: list[tuple[Arg, Any]] = [*enumerate(args), *kwargs.items()]
    return [(k, t) for k, t in pairs if isinstance(t, Tensor)]


def first_tensor(out: Any) -> Tensor | None:
    """Return the output that may be the stream: the only one, or the first of several."""
    if isinstance(out, (tuple, list)) and out:
        out = out[0]
    return out if isinstance(out, Tensor) else None


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
        runs.append(_BoundaryLabels(model, tracer, rules, sequence))

    found = replan(prepare)
    if any(run.take_turns for run in runs):
        raise NotSequenceParallel("two streams take turns")  # the axis remembers the length of one sequence
    if found.trace.leaked_partial:
        raise NotSequenceParallel("a partial gradient meets full activations", found.trace.leaked_partial)
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
        stream = [t for k, t in tensor_args(args, kwargs) if k in (region.args or ())]
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
