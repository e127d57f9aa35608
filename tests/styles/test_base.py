"""`Split` as an exact cut of a tensor, heads over ranks, what a plan takes for a style, and a style of one's own."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import FrozenInstanceError, dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import lightning_tp as ltp
from lightning_tp.core.comm.state import SEQUENCE, I, R
from lightning_tp.core.comm.transitions import invariant_to_replicate, partial_to_invariant
from lightning_tp.core.modules.swap_class import swap_class
from lightning_tp.plan.rule import Rule
from lightning_tp.styles import (
    STYLES,
    BindContext,
    Colwise,
    FusedColwise,
    PrepareInput,
    Rowwise,
    Split,
    Style,
    make_style,
)
from lightning_tp.styles.split import even_split
from lightning_tp.testing import run_ranks
from tests.harness import alone

X = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))


def test_without_sequence_parallelism_no_state_is_a_shard_of_the_sequence() -> None:
    assert Colwise(input=SEQUENCE, output=SEQUENCE).without_sequence() == Colwise(
        input=I, output=I
    )  # of an embedding, by its width
    assert Rowwise(output=SEQUENCE).without_sequence() == Rowwise(output=I)
    kept = Colwise(input=R)
    assert kept.without_sequence() is kept


# -------------------------------------------------------------------------------------------------- what users write


def test_make_style() -> None:
    assert make_style("colwise", "x") == (Colwise(),)
    assert make_style(Rowwise(output="S(1)"), "x") == (Rowwise(output="S(1)"),)
    assert make_style({"style": "fused_colwise", "parts": [4, 2, 2]}, "x") == (FusedColwise(parts=(4, 2, 2)),)
    words = "colwise fused_colwise rowwise sequence vocab_embedding vocab_head replicate prepare_input prepare_output"
    assert set(words.split()) <= set(STYLES)  # plans that are stored somewhere have these


@pytest.mark.parametrize(
    "value", ["columnwise", "Colwise", None, 3, {"style": "x"}, {}, Colwise, nn.Linear, ["colwise"], ("a", "b")], ids=repr
)
def test_what_is_no_style(value: Any) -> None:
    with pytest.raises(
        ltp.TPError, match=r"`layers.\*.wq`: unknown style.*Valid styles are colwise, .*vocab_head.*PrepareModuleInput"
    ):
        make_style(value, "layers.*.wq")
    with pytest.raises(ltp.TPError, match="unknown style"):
        ltp.Plan({"layers.*.wq": value})


def test_an_option_that_a_style_does_not_have() -> None:
    with pytest.raises(ltp.TPError, match=r"`x`: .*'headz'"):
        make_style({"style": "colwise", "headz": 3}, "x")


def test_styles_are_values() -> None:
    style = Colwise(heads=4)
    assert style == Colwise(heads=4) != Colwise() and hash(style) == hash(Colwise(heads=4))
    assert str(style) == "colwise(heads=4)" and str(Colwise()) == "colwise"
    assert style.options() == {"heads": 4} and Colwise().options() == {}
    assert str(PrepareInput(arrives="S(1)", arg="x")) == "prepare_input(arrives=S(1), arg='x')"
    with pytest.raises(FrozenInstanceError):
        style.heads = 8  # type: ignore[misc]
    for name, cls in STYLES.items():
        assert cls.name == name and json.dumps(cls().options()) == "{}"
        assert pickle.loads(pickle.dumps(cls())) == copy.deepcopy(cls()) == cls()


# ------------------------------------------------------------------------------------------------ a style of one's own


class LowRank(nn.Module):
    """(.., 24) -> (.., rank) -> (.., 24), its two matrices in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(10, 24))
        self.b = nn.Parameter(torch.empty(24, 10))
        self.shift_bias = nn.Parameter(torch.empty(24))

    def product(self, x: Tensor) -> Tensor:
        return x @ self.a.T @ self.b.T

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x) + self.shift_bias


@dataclass(frozen=True)
class SplitRank(Style):
    """Each rank has some of the rank-one terms."""

    name: ClassVar[str] = "split_rank"
    note: str = ""

    def splits(self, module: nn.Module, where: str, tp: int) -> dict[str, Split]:
        rank = module.a.shape[0]  # type: ignore[union-attr]
        return {"a": even_split(rank, 0, tp), "b": even_split(rank, 1, tp), "shift_bias": Split()}

    def bind(self, module: nn.Module, site: BindContext) -> None:
        swap_class(module, RunsOnItsTerms, _site=site)


class RunsOnItsTerms(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        axis = self._site.axis  # type: ignore[union-attr]
        y = self.product(invariant_to_replicate(x, axis))  # type: ignore[operator]
        return partial_to_invariant(y, axis) + self.shift_bias


@pytest.mark.parametrize("tp", [2, 4])
def test_a_style_of_ones_own(tp: int) -> None:
    terms = {2: (5, 5), 4: (3, 3, 3, 1)}[tp]
    shapes = {"a": tuple((n, 24) for n in terms), "b": tuple((24, n) for n in terms), "shift_bias": (24,)}

    def body() -> None:
        model = alone(LowRank, SplitRank(), X, shapes=shapes, forward=["all-reduce"], backward=["all-reduce"])
        assert type(model.m).__name__ == "RunsOnItsTermsLowRank" and isinstance(model.m, LowRank)
        assert model.m._site.where == "m"

    run_ranks(body, tp)


def test_a_style_of_ones_own_in_a_plan() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = LowRank()

    plan = ltp.Plan([Rule("m", SplitRank(note="mine"), "because")])
    checked = plan.check(Model(), tp=2)
    assert "split_rank(note='mine')" in str(checked) and "(10, 24) -> (5, 24)" in str(checked)
    assert checked.digest != ltp.Plan([Rule("m", SplitRank())]).check(Model(), tp=2).digest
    with pytest.raises(ltp.TPError, match=r"unknown style.*'split_rank'"):
        ltp.Plan.from_json(plan.to_json())


def test_a_style_of_ones_own_with_an_option_that_is_no_plain_data() -> None:
    """It can't go to JSON, but the plan can be used: ranks compare its digest."""

    @dataclass(frozen=True)
    class Typed(SplitRank):
        dtype: torch.dtype = torch.float32

    plan = ltp.Plan([Rule("m", Typed(dtype=torch.bfloat16))])
    assert len(plan.digest) == 16 and plan.digest != ltp.Plan([Rule("m", Typed(dtype=torch.float16))]).digest
    with pytest.raises(ltp.TPError, match=r"`m`: .*dtype"):
        plan.to_json()


def test_a_style_of_ones_own_that_names_a_parameter_that_there_is_not() -> None:
    model = nn.Sequential(LowRank())
    model[0].a = None
    model[0].other = nn.Parameter(torch.zeros(2))

    @dataclass(frozen=True)
    class Wrong(SplitRank):
        def splits(self, module: nn.Module, where: str, tp: int) -> dict[str, Split]:
            return {"a": Split()}

    with pytest.raises(ltp.TPError, match=r"`0`: .*`split_rank`.*`a`"):
        ltp.Plan([Rule("0", Wrong()), Rule("**", "replicate")]).check(model, tp=2)


def test_a_parametrized_weight_is_refused() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.Linear(8, 4))
    with pytest.raises(ltp.TPError, match=r"`0`: .*`weight`"):
        ltp.Plan({"0": "colwise", "1": "rowwise"}).check(model, tp=2)


@pytest.mark.parametrize(
    "options", [{"heads": "four"}, {"heads": 0}, {"heads": 2.0}, {"heads": True}, {"query_heads": "4"}], ids=str
)
def test_options_of_wrong_types_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ltp.TPError, match=rf"`colwise\({name}=.*{name} is int or None.* Write {name} as a positive number"):
        Colwise(**options)
    assert Colwise(heads=4, query_heads=8).heads == 4
