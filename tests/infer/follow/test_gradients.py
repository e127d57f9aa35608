"""Gradients that code takes while it is followed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import lightning_tp as ltp
from lightning_tp.infer.follow.gradients import gradients_apart
from lightning_tp.infer.follow.run import run


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.up(x).relu()
        return self.down(self.hidden)


def test_they_are_those_of_the_code_and_nothing_stays() -> None:
    model, x, seen = Mlp(), torch.randn(3, 8), []

    def call(model: Any, x: Tensor) -> Tensor:
        loss = model(x).square().sum()
        seen.append(torch.autograd.grad(loss, model.up.weight, retain_graph=True)[0])
        loss.backward()
        seen.append(model.up.weight.grad)
        return loss

    trace, _, _ = run(model, call, x, set(), {})
    assert torch.equal(seen[0], seen[1]) and all(p.grad is None for p in model.parameters())
    model(x).square().sum().backward()
    assert torch.equal(seen[0], model.up.weight.grad)
    assert [(u.name, u.kind) for u in trace.uses] == [("up.weight", "out"), ("down.weight", "in")]  # not those of the backward pass


def test_a_gradient_of_features_is_followed_as_they_are() -> None:
    model = Mlp()

    def call(model: Any, x: Tensor) -> Any:
        out = model(x)
        return torch.autograd.grad(out.sum(), model.hidden, create_graph=True)[0]

    _, gradient, tracer = run(model, call, torch.randn(3, 8), set(), {})
    assert bool(tracer.shadow(gradient).label.all())


def test_gaps_in_the_graph_are_ones() -> None:
    model, y = Mlp(), torch.zeros(2, requires_grad=True)
    with gradients_apart(model):
        (g,) = torch.autograd.grad((y * 2).sum(), model.up.weight, create_graph=True)
        assert torch.equal(g, torch.ones(32, 8)) and g.requires_grad
        assert torch.autograd.grad((y * 2).sum(), model.up.weight, allow_unused=True) == (None,)
        y.sum().backward()
        assert torch.equal(model.down.bias.grad, torch.ones(8))
    assert model.down.bias.grad is None


def test_code_that_asks_whether_gradients_are_enabled() -> None:
    """The plan is that of the way that training goes: only there the hidden features are read whole."""

    class Asks(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x)
            return self.down(h / h.flatten().sort()[0][-1] if h.requires_grad else h)

    def styles(**switch: bool) -> set[str]:
        return {e.style.name for e in ltp.infer_plan(Asks(), (torch.randn(3, 8),), tp=2).check(Asks(), 2).entries}

    assert "rowwise" not in styles()
    with torch.no_grad():
        assert "rowwise" in styles()
