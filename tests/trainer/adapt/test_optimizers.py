"""Optimizers that can't step on shards, or take other steps there."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn

from lightning_tp import TPError
from lightning_tp.testing import fake_world
from lightning_tp.trainer.adapt.optimizers import check_optimizer, unwrapped


def parameters(shards: bool = True) -> list[nn.Parameter]:
    p = nn.Parameter(torch.ones(3, 2))
    if shards:
        p._tp_shard = object()  # type: ignore[attr-defined]
    return [p]


class Lamb(torch.optim.SGD):
    pass


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
        TPError, match=r"`here`: 1 parameters of SGD are not the module's any more \(the first has the shape \(3, 2\)\)"
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
    (text,) = check(torch.optim.Adafactor(parameters()), dp=1)
    assert text.startswith("Adafactor takes row and column statistics of each rank's shard of a split weight")


def test_one_that_looks_at_whole_weights_is_warned_of_once() -> None:
    (text,) = check(Lamb(parameters()))
    assert text.startswith("Lamb takes norms of each rank's shard")
    assert check(Lamb(parameters()), rank=1) == check(Lamb(parameters()), dp=2, tp=1) == []


def test_lightnings_wrapper_is_taken_off() -> None:
    optimizer = torch.optim.SGD(parameters())
    assert unwrapped(LightningOptimizer(optimizer)) is optimizer and unwrapped(optimizer) is optimizer
