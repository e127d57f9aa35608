"""Optimizers that can't step on shards, or take other steps there."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn

from lightning_tp import TPError
from lightning_tp.testing import fake_world
from lightning_tp.trainer.adapt.optimizers import check_optimizer, unwrapped


def parameters(shards: bool = True, dim: int | None = 0) -> list[nn.Parameter]:
    p = nn.Parameter(torch.ones(3, 2))
    if shards:
        p._tp_shard = SimpleNamespace(name="up.weight", split=SimpleNamespace(dim=dim))  # type: ignore[attr-defined]
    return [p]


class Lamb(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=0.1 * float(p.norm() / p.grad.norm()))


def check(optimizer: Any, dp: int = 1, tp: int = 2, rank: int = 0, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught, fake_world(dp * tp, rank):
        warnings.simplefilter("always")
        check_optimizer(optimizer, dp, tp, collected="`here`", **options)
    return [str(w.message) for w in caught]


def test_one_that_works_element_by_element() -> None:
    assert check(torch.optim.AdamW(parameters())) == []


def test_parameters_that_are_not_the_modules() -> None:
    optimizer = torch.optim.SGD([*parameters(), *parameters(False)])
    with pytest.raises(
        TPError, match=r"`here`: 1 parameters of SGD no longer belong to the module \(the first has the shape \(3, 2\)\)"
    ):
        check(optimizer)
    assert check(optimizer, plain=False) == []


def test_lbfgs_in_one_process_only() -> None:
    with pytest.raises(TPError, match=r"ranks would diverge\. Use one process \(this run has 2\)"):
        check(torch.optim.LBFGS(parameters()))
    assert check(torch.optim.LBFGS(parameters()), tp=1) == []


def test_adafactor_not_over_fsdp() -> None:
    with pytest.raises(TPError, match=r"dp=2\. Use tp=4"):
        check(torch.optim.Adafactor(parameters()), dp=2)


@pytest.mark.parametrize("make", [torch.optim.Adafactor, Lamb, torch.optim.Muon], ids=str)
def test_one_that_looks_at_full_weights_is_refused(make: Any) -> None:
    with pytest.raises(TPError, match=r"does not work element by element, .* tp=2 ranks .* Use .*AdamW.* is `up\.weight`\)"):
        check(make(parameters()))
    assert check(make(parameters(dim=None))) == check(make(parameters()), tp=1) == check(make(parameters()), plain=False) == []


def test_one_that_cant_be_tried_is_warned_of() -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise KeyError("no name")

    (text,) = check(Odd(parameters()))
    assert text.startswith("Odd could not be tried on a small matrix (KeyError: 'no name')") and "Compare a few steps" in text


def test_lightnings_wrapper_is_taken_off() -> None:
    optimizer = torch.optim.SGD(parameters())
    assert unwrapped(LightningOptimizer(optimizer)) is optimizer and unwrapped(optimizer) is optimizer
