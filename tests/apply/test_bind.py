"""Parameters are replaced once each, tied ones together; styles are bound layers first; a style that can't be bound names its module."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import lightning_tp as ltp
from lightning_tp import Plan, TPError
from lightning_tp.apply.bind import BindError, bind_styles, check_unchanged, local_parameter, replace_parameters
from lightning_tp.apply.parallelize import parallelize
from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.fake_world import FakeGroup
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.core.comm.state import S
from lightning_tp.styles import BindContext, Split, Style
from lightning_tp.styles.split import even_split
from lightning_tp.testing import run_ranks, single_rank_mesh


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(6, 4)
        self.up, self.down = nn.Linear(4, 8, bias=False), nn.Linear(8, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.tok.weight
        self.again = self.up  # one module with two names


PLAN = Plan({"tok": "vocab_embedding", "up": "colwise", "down": "rowwise", "head": "vocab_head"})


def test_every_parameter_is_replaced_once() -> None:
    model = Tied()
    plan = PLAN.check(model, tp=2)
    made: list[tuple[str, Split]] = []

    def make(name: str, p: nn.Parameter, split: Split) -> nn.Parameter:
        made.append((name, split))
        return local_parameter(p, split, rank=1)

    full = {n: p.detach().clone() for n, p in model.named_parameters()}
    replace_parameters(model, plan, make)
    assert [name for name, _ in made] == ["tok.weight", "up.weight", "down.weight", "down.bias"]
    assert all(split == plan.splits[name] for name, split in made)
    assert model.head.weight is model.tok.weight and model.again.weight is model.up.weight
    assert torch.equal(model.tok.weight, full["tok.weight"][3:]) and torch.equal(model.up.weight, full["up.weight"][4:])
    assert torch.equal(model.down.weight, full["down.weight"][:, 4:]) and torch.equal(model.down.bias, full["down.bias"])


def test_a_local_parameter() -> None:
    p = nn.Parameter(torch.arange(6.0), requires_grad=False)
    half, whole = local_parameter(p, even_split(6, 0, 2), rank=0), local_parameter(p, Split(), rank=0)
    assert half.tolist() == [0.0, 1.0, 2.0] and half.untyped_storage().nbytes() == 12 and not half.requires_grad
    assert whole.data_ptr() == p.data_ptr() and not whole.requires_grad
    assert Split(S(0), (((4, 6), (0, 1)),)).take(p, 0).tolist() == [4.0, 5.0, 0.0]


@dataclass(frozen=True)
class Notes(Style):
    """Writes down when it is bound."""

    name: ClassVar[str] = "notes"
    log: ClassVar[list[tuple[str, bool]]] = []
    splits_parameters: ClassVar[bool] = False
    fails: bool = False

    def splits(self, module: nn.Module, where: str, tp: int) -> dict[str, Split]:
        return {}

    def bind(self, module: nn.Module, site: BindContext) -> None:
        if self.fails:
            raise KeyError("no such thing")
        inner: nn.Module = module[1] if isinstance(module, nn.Sequential) else module
        self.log.append((site.where, type(inner) is not nn.Linear))


def test_layers_are_bound_before_what_is_around_them() -> None:
    Notes.log.clear()
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    plan = Plan({"": Notes(), "0": "colwise", "1": "rowwise"}).check(model, tp=2)
    bind_styles(model, plan, Axis(FakeGroup(0, 2)))
    assert Notes.log == [("", True)]  # the row-wise layer had its new class by then


def test_a_style_that_can_not_be_bound_names_its_module() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4), nn.ReLU())
    plan = Plan({"0": "colwise", "1": "rowwise", "2": Notes(fails=True)}).check(model, tp=2)
    with pytest.raises(BindError, match=r"`2`: KeyError: 'no such thing'") as info:
        bind_styles(model, plan, Axis(FakeGroup(0, 2)))
    assert info.value.where == "2" and isinstance(info.value, TPError) and isinstance(info.value.__cause__, KeyError)


def test_parameters_that_changed_after_the_split_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    check_unchanged(model)  # never split
    with single_rank_mesh() as mesh:
        parallelize(model, mesh, {"**": "replicate"})
        check_unchanged(model)
        model[0] = nn.Sequential(model[0])
        with pytest.raises(
            TPError, match=r"changed after it was split \(new: `0\.0\.bias` \(2 in all\); gone: `0\.bias` \(2 in all\)\)"
        ):
            check_unchanged(model)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x) * (len(self.up.bias) / self.up.out_features**0.5) * self.up.weight.shape[0]
        return self.down(h.view(*x.shape[:-1], self.up.out_features) * self.down.in_features)


def scaled() -> None:
    for replaced in (False, True):
        torch.manual_seed(0)
        one, x = Scaled(), torch.randn(2, 3, 8)
        many: Any = copy.deepcopy(one)
        for model in (one, many) if replaced else ():
            model.forward = partial(_on_the_object, model)
        wanted = one(x)
        plan = ltp.infer_plan(one, (x,), tp=2)
        assert plan.check(one, 2).splits["up.weight"].dim == 0
        ltp.parallelize(many, make_mesh("cpu", 1, 2), plan)
        many._ways = None  # no unsplit run helps
        torch.testing.assert_close(many(x), wanted, rtol=1e-5, atol=1e-4)


def _on_the_object(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.down(m.up(x) * (m.up.weight.shape[0] / m.up.bias.numel() ** 2))


def test_code_that_computes_with_sizes_of_layers() -> None:
    run_ranks(scaled, 2)
