"""`sequence` and `replicate`: whole parameters, and which of their gradients are shares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_tp as ltp
from lightning_tp.styles import Colwise, PrepareInput, PrepareOutput, Replicate, Rowwise, Sequence
from lightning_tp.testing import randomize_, run_ranks
from tests.harness import alone, mesh

AR, AG, RS = "all-reduce", "all-gather", "reduce-scatter"


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("length", [16, 17, 3])
def test_norm_on_this_ranks_tokens(tp: int, length: int) -> None:
    """In every mixture of what arrives and what leaves; 3 tokens over 4 ranks leave one with padding only."""
    x = torch.randn(2, length, 24, generator=torch.Generator().manual_seed(0))

    def body() -> None:
        for norm in (nn.LayerNorm, nn.RMSNorm):
            shapes = {"weight": (24,), "bias": (24,)}
            for inputs, enter, back in (("S(1)", [], []), ("I", [], [AG])):
                for output, leave in (("S(1)", []), ("I", [AG])):
                    style = Sequence(input=inputs, output=output)  # type: ignore[arg-type]
                    kwargs: Any = dict(arrives=inputs, leaves=output, shapes=shapes)
                    alone(lambda norm=norm: norm(24), style, x, forward=enter + leave, backward=[*back, AR], **kwargs)

    run_ranks(body, tp)


def test_a_module_with_parameters_below_it() -> None:
    x = torch.randn(1, 9, 24, generator=torch.Generator().manual_seed(0))

    def body() -> None:
        shapes = {"0.weight": (24,), "0.bias": (24,), "1.weight": (24, 24), "1.bias": (24,)}
        alone(
            lambda: nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 24)),
            Sequence(input="I", output="I"),
            x,
            shapes=shapes,
            forward=[AG],
            backward=[AG, AR],  # one all-reduce for all four
        )

    run_ranks(body, 2)


class Normed(nn.Module):
    """An MLP whose hidden units are scaled by a whole parameter: each rank sees its share of the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 32)
        self.scale = nn.Parameter(torch.ones(8))
        self.norm = nn.LayerNorm(8)
        self.down = nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        y = self.norm(y.view(*y.shape[:-1], -1, 8)) * self.scale
        return self.down(y.flatten(-2))


SHAPES = {
    "up.weight": (16, 24),
    "up.bias": (16,),
    "scale": (8,),
    "norm.weight": (8,),
    "norm.bias": (8,),
    "down.weight": (24, 16),
    "down.bias": (24,),
}
X = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(0))


def test_replicate_with_a_share_of_the_gradient() -> None:
    def body() -> None:
        for partial in (Replicate(state="R"), "replicate"):  # the plan finds it out inside a gathered region
            alone(
                Normed,
                PrepareInput(arrives="S(1)"),
                X,
                arrives="S(1)",
                rules={"up": "colwise", "down": Rowwise(output="I"), "norm": partial, "scale": partial},
                shapes=SHAPES,
                forward=[AG, AR],
                backward=[RS, AR],
            )

    run_ranks(body, 2)


def test_replicate_of_what_all_ranks_see() -> None:
    def body() -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.LayerNorm(24)
                self.mlp = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 24))
                self.pos = nn.Parameter(torch.ones(6, 24))

            def forward(self, x: Tensor) -> Tensor:
                return self.mlp(self.norm(x + self.pos))

        shapes = {
            "norm.weight": (24,),
            "norm.bias": (24,),
            "mlp.0.weight": (16, 24),
            "mlp.0.bias": (16,),
            "mlp.2.weight": (24, 16),
            "mlp.2.bias": (24,),
            "pos": (6, 24),
        }
        for style in ("replicate", Replicate(state="I")):
            rules = {"mlp.0": Colwise(input="I"), "mlp.2": "rowwise", "norm": style, "pos": style}
            alone(Model, "", X, rules=rules, shapes=shapes, forward=[AR], backward=[AR])

    run_ranks(body, 2)


def test_a_wrong_word_about_a_gradient_is_noticed_in_the_first_backward_pass() -> None:
    def body() -> None:
        rules: dict[str, Any] = {"up": Colwise(input="I"), "down": "rowwise", "scale": Replicate(state="R")}
        model = randomize_(Normed())
        ltp.parallelize(model, mesh(), {**rules, "norm": Replicate(state="I")})
        with pytest.raises(ltp.TPError, match=r"`norm.weight` is replicated.*not the same on all tp=2 ranks.*state='R'"):
            model(X).square().sum().backward()

        model = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 32), nn.Linear(32, 24))
        rules = {"0": Replicate(state="R"), "1": Colwise(input="I"), "2": "rowwise"}
        ltp.parallelize(randomize_(model), mesh(), rules)
        with pytest.raises(ltp.TPError, match=r"`0.weight`.*all tp=2 ranks have the same.*2 times too large.*state='I'"):
            model(X).square().sum().backward()

    run_ranks(body, 2)


def test_dropout_drops_this_ranks_tokens() -> None:
    def body() -> None:
        model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4, bias=False))
        plan = {"0": Sequence(), "1": Colwise(input="S(1)", output="I")}
        ltp.parallelize(model, mesh(), plan)
        axis = model._tp_registry.gradients.axis
        axis.seq_len = 10
        torch.manual_seed(0)
        y = model[0](torch.ones(1, 5, 4))
        assert y.shape == (1, 5, 4) and set(y.flatten().tolist()) == {0.0, 2.0}
        model.eval()
        assert bool((model[0](torch.ones(1, 5, 4)) == 1).all())

    run_ranks(body, 2)


def test_splits() -> None:
    assert {n: s.sum_over(4) for n, s in Sequence().splits(nn.LayerNorm(4), "n", 4).items()} == {"weight": 4, "bias": 4}
    assert Sequence().splits(nn.Dropout(), "d", 4) == {}
    for style, copies in ((Replicate(), 1), (Replicate(state="I"), 1), (Replicate(state="R"), 4)):
        assert {s.sum_over(4) for s in style.splits(nn.LayerNorm(4), "n", 4).values()} == {copies}
        assert {s.dim for s in style.splits(nn.LayerNorm(4), "n", 4).values()} == {None}


def test_states_that_it_can_not_take_or_leave() -> None:
    for option in ("input", "output"):
        with pytest.raises(ltp.TPError, match=rf"`sequence\({option}=S\(-1\)\)`: {option} can be S\(1\) or I"):
            Sequence(**{option: "S(-1)"})
    assert PrepareOutput().splits(nn.LayerNorm(4), "n", 2) == {}
