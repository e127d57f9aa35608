"""Labels at the boundaries of regions, which are there while a region runs, and what comes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_tp.core.comm.state import WIDTH, I, R
from lightning_tp.infer.follow.trace import TensorFacts
from lightning_tp.infer.follow.tracer import FeatureTracer
from lightning_tp.infer.sequence.boundaries import LabelHooks, Replanned, first_tensor, replan_from_boundaries, tensor_args
from lightning_tp.infer.sequence.sequence_plan import NotSequenceParallel, Reduction, Region, SequencePlan
from lightning_tp.plan.plan import Plan
from lightning_tp.plan.rule import Rule
from lightning_tp.styles import Colwise


def test_arguments_that_are_tensors_are_found_by_position_or_name() -> None:
    x, y = torch.ones(1), torch.ones(1)
    assert [(k, id(t)) for k, t in tensor_args((1, x, [y]), {"mask": y, "scale": 2.0})] == [(1, id(x)), ("mask", id(y))]


def test_the_stream_is_the_first_of_what_a_block_returns() -> None:
    x = torch.ones(1)
    assert first_tensor(x) is x and first_tensor((x, torch.ones(2))) is x
    assert first_tensor(()) is None and first_tensor((None, x)) is None and first_tensor({"x": x}) is None


def test_a_region_sees_other_labels_until_it_is_left() -> None:
    hooks = LabelHooks(nn.Linear(2, 2), FeatureTracer(nn.Linear(2, 2), set(), {}))
    x, label = torch.ones(2, 3), torch.arange(3).expand(2, 3)
    hooks.tracer.put(x, TensorFacts(label, None, True))
    hooks.enter_region(Region("mlp", Reduction.OF_STREAM), [x, x], lambda t: None)
    assert hooks.tracer.shadow(x).label is None and hooks.tracer.shadow(x).grad
    assert [len(given) for _, given in hooks.entered] == [1]  # one tensor, though it was given twice
    hooks.leave_region()
    assert hooks.tracer.shadow(x).label is label and not hooks.entered


class Net(nn.Module):
    """A block of two regions; in the first, one layer reads the stream, and one something else."""

    def __init__(self, nested: bool = False) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
        self.ends = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.nested = nested

    def forward(self, x: Tensor) -> Tensor:
        if self.nested:
            self.ends[0](x)
        x = self.ends[0](x)
        return self.ends[1](self.block["c"](self.block["a"](x) + self.block["b"](torch.ones(2, 4))))


SEQUENCE = SequencePlan({("ends.0", "ends.1"): 0}, {"block.a": Region("block.a", Reduction.OF_STREAM, (0,), True)})
RULES = [Rule("block.a", Colwise(input=I)), Rule("block.b", Colwise(input=I)), Rule("block.c", Colwise(input=I, output=I))]


def replanned(model: Net, escaped: Any = (), labelled: bool = False) -> tuple[Replanned, Any]:
    """Follow features by hand: `c` is given features if `labelled`."""

    def replan(prepare: Any) -> Replanned:
        tracer = FeatureTracer(model, set(), {})
        prepare(tracer)
        assert tracer.gathered
        if labelled:
            model.block["c"].register_forward_pre_hook(
                lambda m, args: tracer.put(args[0], TensorFacts(torch.arange(1, 5).expand(2, 4), None, True)), prepend=True
            )
        model(torch.ones(2, 4))
        tracer.trace.leaked_partial.update(dict.fromkeys(escaped))
        return Replanned(Plan([]), tracer.trace, set())

    return replan_from_boundaries(model, RULES, SEQUENCE, replan)


def test_column_wise_layers_are_noted_with_the_state_of_their_input() -> None:
    assert replanned(Net())[1] == {"block.a": {R}, "block.b": {I}, "block.c": {I}}
    assert replanned(Net(), labelled=True)[1]["block.c"] == {WIDTH}


def test_streams_that_take_turns_or_gradients_that_escape_are_refused() -> None:
    with pytest.raises(NotSequenceParallel, match="two streams take turns"):
        replanned(Net(nested=True))
    with pytest.raises(NotSequenceParallel, match="a partial gradient meets full activations") as caught:
        replanned(Net(), escaped={"block.b"})
    assert caught.value.modules == {"block.b"}
