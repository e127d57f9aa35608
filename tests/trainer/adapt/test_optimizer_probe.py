"""Optimizers are tried on halves of a matrix: those that work element by element pass, and nothing of the user's is touched."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, Muon, Optimizer, RAdam, RMSprop, lr_scheduler

from lightning_tp.trainer.adapt.optimizer_probe import difference_on_halves

Make = Callable[[list[nn.Parameter]], Optimizer]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(8, 6), (6,), (6, 8)]]


class Own(SGD):
    """Has a rule of its own: `update(parameter, gradient)`."""

    update: Callable[[Any, Tensor, Tensor], Tensor]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.update(p, p.grad))


def own(rule: Callable[[Tensor, Tensor], Tensor]) -> Make:
    return lambda ps: type("Ruled", (Own,), {"update": lambda self, p, g: rule(p, g)})(ps)


class Lookahead(Optimizer):
    """Wraps another one; holds copies of the weights from the start."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner, self.param_groups, self.state, self.steps = inner, inner.param_groups, inner.state, 0
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()
        self.steps += 1
        for group, slow in zip(self.param_groups, self.slow, strict=True):
            for p, q in zip(group["params"], slow, strict=False):
                p.copy_(q.lerp_(p, 0.5)) if self.steps % 2 == 0 else None


class GlobalSize(SGD):
    """Needs the gradients of all parameters."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        params = [p for group in self.param_groups for p in group["params"]]
        norm = max(float(p.grad.norm()) for p in params[:1])
        for p in params[1:]:
            p.sub_(p.grad / norm)


GOOD: dict[str, Make] = {
    "sgd": lambda ps: SGD(ps, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": AdamW,
    "fused": lambda ps: AdamW(ps, fused=True),
    "foreach": lambda ps: Adam(ps, foreach=True, amsgrad=True),
    "a rate that is a tensor": lambda ps: Adam(ps, lr=torch.tensor(1e-3)),
    "state from the start": lambda ps: Adagrad(ps, initial_accumulator_value=0.1),
    "radam": RAdam,
    "rmsprop": lambda ps: RMSprop(ps, centered=True),
    "a tiny rate": lambda ps: SGD(ps, lr=1e-12),
    "lookahead": lambda ps: Lookahead(AdamW(ps)),
    "lookahead of state": lambda ps: Lookahead(Adagrad(ps)),
    "sign": own(lambda p, g: 0.1 * g.sign()),
    "groups": lambda ps: AdamW([{"params": [p], "weight_decay": i / 10} for i, p in enumerate(ps)]),
}
BAD: dict[str, Make] = {
    "muon": lambda ps: Muon([p for p in ps if p.ndim == 2]),
    "adafactor": Adafactor,
    "trust ratio": own(lambda p, g: 0.1 * g * p.norm() / g.norm()),
    "mean square": own(lambda p, g: 0.1 * g / g.square().mean().sqrt()),
    "maximum": own(lambda p, g: 0.1 * g / g.abs().max()),
    "centered": own(lambda p, g: 0.1 * (g - g.mean())),
    "sorted": own(lambda p, g: 0.1 * (g.abs() >= g.abs().flatten().median()) * g),
    "noise": own(lambda p, g: g + 0.1 * torch.randn_like(p)),
    "of another parameter": GlobalSize,
}


@pytest.mark.parametrize("kind", GOOD)
def test_element_by_element(kind: str) -> None:
    for dim in (0, 1):
        ps = parameters()
        assert difference_on_halves(GOOD[kind](ps), ps[0], dim) is None
    ps = parameters()
    assert difference_on_halves(GOOD[kind](ps), ps[1], 0) is None  # a vector


@pytest.mark.parametrize("kind", BAD)
def test_statistics_show(kind: str) -> None:
    for dim in (0, 1):
        ps = parameters()
        found = difference_on_halves(BAD[kind](ps), ps[0], dim)
        assert found is not None and "% of what it moves" in found
        assert found.startswith(
            "together with another parameter" if kind == "of another parameter" else "alone, step 1 of a matrix"
        )


def test_rows_may_belong_together_where_none_is_cut() -> None:
    ps = parameters()
    optimizer = own(lambda p, g: g / g.norm(dim=-1, keepdim=True))(ps[:1])
    assert difference_on_halves(optimizer, ps[0], 0) is None
    assert "halves differ" in str(difference_on_halves(optimizer, ps[0], 1))


def test_nothing_of_the_users_is_touched() -> None:
    ps = parameters()
    optimizer, called = Lookahead(AdamW(ps, lr=0.1)), []
    scheduler = lr_scheduler.LambdaLR(AdamW(ps), lambda i: i / 10)  # a warm-up from 0
    inner = scheduler.optimizer
    inner.register_step_post_hook(lambda *_: called.append(1))
    before = [p.detach().clone() for p in ps], torch.get_rng_state(), random.getstate()
    for each in (optimizer, inner):
        assert difference_on_halves(each, ps[0], 0) is None
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before[0], ps, strict=True))
    assert torch.equal(before[1], torch.get_rng_state()) and before[2] == random.getstate()
    assert optimizer.steps == 0 and not optimizer.state and not called and inner.param_groups[0]["lr"] == 0
    assert torch.equal(optimizer.slow[0][0], ps[0])


def test_what_cant_be_tried_raises() -> None:
    def refuse(p: Tensor, g: Tensor) -> Tensor:
        raise KeyError("a name")

    with pytest.raises(KeyError, match="a name"):
        difference_on_halves(own(refuse)(ps := parameters()), ps[0], 0)
