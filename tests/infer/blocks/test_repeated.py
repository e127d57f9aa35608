"""What follows for names and rules from blocks that do the same, and how their copies are skipped in a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_tp.infer.blocks.repeated import RepeatedBlocks, skip_copies
from lightning_tp.infer.follow.trace import TensorFacts
from lightning_tp.infer.follow.tracer import FeatureTracer
from lightning_tp.plan.rule import Rule
from lightning_tp.styles import PrepareInput, Replicate

BLOCKS = RepeatedBlocks({"layers.2": "layers.0", "layers.3": "layers.1", "layers.4": "layers.0"})


def test_names_in_a_copy_are_those_in_its_representative() -> None:
    names = ["layers.2", "layers.4.up.weight", "layers.20.up", "layers.0.up", "head", ""]
    assert [BLOCKS.representative(n) for n in names] == [
        "layers.0",
        "layers.0.up.weight",
        "layers.20.up",
        "layers.0.up",
        "head",
        "",
    ]


def test_rules_are_expanded_to_copies_but_for_the_boundaries_of_blocks() -> None:
    rules = [
        Rule("layers.0.up", "colwise", "why"),
        Rule("layers.0", PrepareInput()),
        Rule("layers.1", Replicate()),
        Rule("head", "colwise"),
    ]
    expanded = BLOCKS.expand_to_copies(rules)
    assert expanded[:4] == rules
    assert [(r.pattern, r.style.name, r.reason) for r in expanded[4:]] == [
        ("layers.2.up", "colwise", "why"),
        ("layers.3", "replicate", ""),
        ("layers.4.up", "colwise", "why"),
    ]


def test_a_block_that_runs_is_no_copy() -> None:
    assert BLOCKS.without({"layers.2", "layers.0"}).copies == {"layers.3": "layers.1", "layers.4": "layers.0"}


def test_copies_of_another_kind_have_a_representative_of_their_own_kind() -> None:
    blocks = RepeatedBlocks({f"b{i}": "b0" for i in range(1, 6)})
    kinds = {"b0": "x", "b1": "y", "b2": "x", "b3": "y", "b4": "x"}  # b5 is of no kind, and stands alone
    assert blocks.refined(kinds).copies == {"b2": "b0", "b3": "b1", "b4": "b0"}


# skipped copies

LAYERS = RepeatedBlocks({"1": "0", "2": "0"})


class Block(nn.Module):
    def forward(self, x: Tensor, scale: float = 1.0, flag: bool = False, cache: list[int] | None = None) -> Any:
        self.ran = True
        return x.sum(-1) * scale, x, None, {"flag": flag}


def run(*inputs: tuple[Any, ...], tracer: FeatureTracer | None = None) -> tuple[list[Any], set[str], nn.Module]:
    model, ran, outs = nn.ModuleList(Block() for _ in range(3)), set(), []
    with skip_copies(model, LAYERS, tracer, ran):
        for block, given in zip(model, inputs, strict=True):
            outs.append(block(*given))
    assert all("forward" not in block.__dict__ for block in model)
    return outs, ran, model


def test_a_copy_returns_new_tensors_of_the_same_shapes_and_its_own_inputs() -> None:
    x, y, z = (torch.ones(2, 4) for _ in range(3))
    outs, ran, _ = run((x,), (y,), (z,))
    assert ran == {"0"}
    assert [out[0].shape for out in outs] == [(2,)] * 3 and outs[0][0] is not outs[1][0]
    assert outs[1][1] is y and outs[2][1] is z and outs[2][2:] == (None, {"flag": False})


@pytest.mark.parametrize(
    ("given", "skipped"),
    [
        ((torch.ones(2, 4), 3.0), True),  # a float scales
        ((torch.ones(2, 5), 1.0), False),
        ((torch.ones(2, 4).double(), 1.0), False),
        ((torch.ones(2, 4), 1.0, True), False),
        ((torch.ones(2, 4), 1.0, False, [1]), False),
    ],
)
def test_other_inputs_make_a_copy_run(given: tuple[Any, ...], skipped: bool) -> None:
    first = (torch.ones(2, 4), 1.0, False)[: max(len(given), 2)]
    _, ran, _ = run(first, given, first)
    assert ran == ({"0"} if skipped else {"0", "1"})


def tracer_of(labels: dict[int, Tensor], tensors: list[Tensor]) -> FeatureTracer:
    tracer = FeatureTracer(nn.Linear(1, 1), set(), {})
    for i, t in enumerate(tensors):
        tracer.put(t, TensorFacts(labels.get(i), None, i == 3))
    return tracer


def test_inputs_with_other_features_or_gradients_make_a_copy_run() -> None:
    xs = [torch.ones(2, 4) for _ in range(3)]
    features, others = torch.arange(4).expand(2, 4), torch.arange(4).flip(0).expand(2, 4)
    assert run(*((x,) for x in xs), tracer=tracer_of({0: features, 1: features, 2: features}, xs))[1] == {"0"}
    assert run(*((x,) for x in xs), tracer=tracer_of({0: features, 1: others, 2: features}, xs))[1] == {"0", "1"}
    assert run(*((x,) for x in xs), tracer=tracer_of({0: features, 2: features}, xs))[1] == {"0", "1"}
    with_gradient = [torch.ones(2, 4), torch.ones(2, 4), torch.ones(2, 4), torch.ones(2, 4)]
    tracer = tracer_of({}, with_gradient)
    assert run((with_gradient[0],), (with_gradient[3],), (with_gradient[1],), tracer=tracer)[1] == {"0", "1"}


def test_outputs_of_a_copy_have_the_features_of_its_own_inputs() -> None:
    x, y, z = (torch.ones(2, 4) for _ in range(3))
    features = torch.arange(1, 5).expand(2, 4)
    tracer = tracer_of({0: features, 1: features.clone(), 2: features}, [x, y, z])

    class Moves(Block):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            out = x.clone()
            tracer.put(out, TensorFacts(tracer.shadow(x).label, None, True))
            return out

    model = nn.ModuleList(Moves() for _ in range(3))
    with skip_copies(model, LAYERS, tracer):
        model[0](x)
        out = model[1](y)
    assert tracer.shadow(out).label is tracer.shadow(y).label and tracer.shadow(out).grad


def test_forwards_come_back_after_an_error() -> None:
    model = nn.ModuleList(Block() for _ in range(3))
    kept = model[1].__dict__["forward"] = model[1].forward
    with pytest.raises(ZeroDivisionError), skip_copies(model, LAYERS):
        _ = 1 // 0
    assert model[1].__dict__["forward"] is kept and "forward" not in model[0].__dict__
