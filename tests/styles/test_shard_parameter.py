from __future__ import annotations

import torch
from torch import nn

import lightning_tp as ltp
from lightning_tp.styles import ShardParameter

RANGES = (((0, 2), (5, 6)), ((2, 5),))


def test_a_rank_holds_its_ranges() -> None:
    split = ShardParameter(1, RANGES).split(tp=2)
    whole = torch.arange(12).view(2, 6)
    assert split.take(whole, 0).tolist() == [[0, 1, 5], [6, 7, 11]]
    assert split.take(whole, 1).tolist() == [[2, 3, 4], [8, 9, 10]]


def test_each_parameter_of_a_module_is_split() -> None:
    style = ShardParameter(0, RANGES)
    assert style.splits(nn.Linear(3, 6), "fc", 2) == dict.fromkeys(("weight", "bias"), style.split(2))


def test_json_keeps_it() -> None:
    plan = ltp.Plan({"w": ShardParameter(0, (((0, 2),), ((2, 4),)))})
    assert ltp.Plan.from_json(plan.to_json()) == plan
