from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_tp.estimate import estimate
from lightning_tp.estimate.rank.rank_model import Unit, local_params, units_of
from lightning_tp.estimate.rank.settings import PRECISIONS, Settings
from lightning_tp.plan.plan import Plan
from tests.estimate.by_hand import DP, ROWS, model_of, step
from tests.estimate.models import TOKENS, meta_llama


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 6)) for _ in range(2))
        self.head = nn.Linear(6, 7, bias=False)
        self.twin = nn.Linear(6, 7, bias=False)
        self.twin.weight = self.head.weight
        self.register_parameter("scale", nn.Parameter(torch.tensor(1.0), requires_grad=False))


def test_parameters_of_a_rank() -> None:
    plan = Plan({"layers.*.0": "colwise", "layers.*.1": "rowwise", "**": "replicate"}).check(Net(), 2)
    found = {p.name: p for p in local_params(Net(), plan, Settings(2, 4, precision=PRECISIONS["bf16-true"]))}
    up, down, head, scale = (found[n] for n in ("layers.1.0.weight", "layers.0.1.weight", "head.weight", "scale"))
    assert (up.shape, up.tp_shape, up.local_shape, up.unit) == (
        (10, 6),
        (5, 6),
        (2, 6),
        "layers.1",
    )  # 5 rows on 4 ranks: padded to 8
    assert (down.tp_shape, down.local_shape, down.numel, down.bytes) == ((6, 5), (2, 5), 10, 20)
    assert (head.local_shape, head.unit, head.dtype) == ((2, 6), "", torch.bfloat16) and "twin.weight" not in found
    assert (scale.local_shape, scale.numel, scale.requires_grad) == ((), 1, False)
    alone = {p.name: p.local_shape for p in local_params(Net(), plan, Settings(2, 1, rank=1))}
    assert alone["layers.1.0.weight"] == (5, 6) and alone["scale"] == ()


def test_which_parameters_are_trained() -> None:
    """Of a block that did not run, those whose counterparts got a gradient."""
    model = model_of(step(), {"layers.0": "layers.0", "layers.1": "layers.1", "layers.2": "layers.1"})
    frozen, *rest = model.params
    model = replace(model, params=(replace(frozen, requires_grad=False), *rest))
    for gradients, trained in (
        ({"layers.0.w": 1, "layers.1.w": 1, "head": 1}, ["layers.1.w", "layers.2.w", "head"]),
        ({"layers.2.w": 1}, ["layers.2.w"]),
        ({"head": 1}, ["head"]),
    ):
        found = replace(model, trace=replace(model.trace, gradients=gradients))
        assert [p.name for p in found.trained] == trained


def test_more_data_parallel_ranks_only_cut_what_is_held() -> None:
    small, large = (estimate(meta_llama(), TOKENS, mesh) for mesh in ((2, 2), (64, 2)))
    assert large.memory.parameters < small.memory.parameters / 20
    assert large.memory.activations == small.memory.activations
    assert large.time.dp > small.time.dp  # latency
    model = model_of(step())
    assert [p.rows for p in model.with_data_parallel(8).params] == [3, 5, 8, 2]  # of 20, 40, 60 and 10


@pytest.mark.parametrize(("precision", "gathered", "reduced"), [("32-true", 4, 4), ("bf16-mixed", 2, 4), ("bf16-fsdp", 2, 4)])
def test_bytes_of_units(precision: str, gathered: int, reduced: int) -> None:
    found = units_of(model_of(step()), PRECISIONS[precision], DP)
    assert list(found) == ["layers.0", "layers.1", "layers.2", ""]
    for unit, rows in ROWS.items():
        assert found[unit] == Unit(rows * DP * gathered, rows * DP * reduced, rows * 4)


def test_frozen_parameters_are_gathered_but_not_reduced() -> None:
    model = model_of(step())
    frozen = replace(model, params=tuple(replace(p, requires_grad=p.unit != "layers.1") for p in model.params))
    found = units_of(frozen, PRECISIONS["32-true"], DP)
    assert found["layers.1"] == Unit(ROWS["layers.1"] * DP * 4, 0, 0) and found["layers.2"].reduced > 0
