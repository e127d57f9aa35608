from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lightning_tp.estimate.rank.extrapolate import ExtrapolatingCache, Line, NotLinear, extrapolated
from lightning_tp.estimate.rank.inputs import loss_of, resized
from lightning_tp.estimate.rank.rank_model import RankModel
from lightning_tp.estimate.rank.settings import Settings
from lightning_tp.estimate.trace.forward_log import ForwardEvent
from lightning_tp.estimate.trace.step_trace import Alloc, CollectiveCall, FusedOp, Label
from tests.estimate.by_hand import model_of, op, outside
from tests.estimate.models import TOKENS, meta_llama

X = Label("x", "activation")


def test_lines() -> None:
    line = Line(1, 2, 5)
    assert line(7, 7) == 7 and line(10, 12) == 18 and Line(2, 4, 8)(10, 12) == 16
    with pytest.raises(NotLinear):
        Line(2, 4, 5)(10, 13)


def model(n: int, *more: object, **changes: object) -> RankModel:
    """With `n` samples: bytes, FLOPs and shapes grow with them, and the weight's gradient does not."""
    matmul = op("mm", "x", flops=2 * n * 4 * 8, bytes=n * 10, shape=(1, n, 4, 8))
    call = CollectiveCall("all-gather", n * 16, "x", "forward")
    events = [Alloc(X, n * 100), matmul, FusedOp(matmul), call, Alloc(X, -n * 100), Alloc(Label("w", "backward"), 250), *more]
    traced = model_of([outside("forward", *events)])  # type: ignore[arg-type]
    log = (ForwardEvent("collective", "x", "all-gather", bytes=n * 16), ForwardEvent("kernel", "x", "product", (1, n, 4, 8)))
    return replace(traced, trace=replace(traced.trace, **({"forward": log, "freed_after_forward": {X: 3 * n}} | changes)))


def test_a_third_batch_from_two() -> None:
    found = extrapolated(model(1), model(2), Line(1, 2, 7))
    assert found == model(7)
    assert found.trace.segments[0].peak == {X: 700} and model(2).trace.segments[0].peak == {X: 0, Label("w", "backward"): 250}


@pytest.mark.parametrize(
    "other",
    [
        model(2, op("add")),  # another kernel
        model(2, followed={"layers.0": "layers.1"}),
        model(2, gradients={"head": 1}),
        model(2, forward=()),
        model(2, freed_after_forward={}),
        model(2, forward=(ForwardEvent("collective", "y", "all-gather"), ForwardEvent("kernel", "x", "product", (1, 2, 4, 8)))),
        model(2, forward=tuple(e._replace(tensor=3) for e in model(2).trace.forward)),  # they read another tensor
    ],
)
def test_traces_that_do_not_do_the_same(other: RankModel) -> None:
    with pytest.raises(NotLinear):
        extrapolated(model(1), other, Line(1, 2, 4))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (op("add", "x"), op("add", "y")),
        (op("add", "x"), CollectiveCall("all-gather", 1, "x", "forward")),
        (CollectiveCall("all-gather", 1, "x", "forward"), CollectiveCall("all-reduce", 1, "x", "forward")),
        (Alloc(X, 1), Alloc(Label("y", "activation"), 1)),
        (op("mm", shape=(1, 2, 3, 4), flops=48), op("mm", shape=(1, 3, 4, 4), flops=96)),  # two sizes grow: its FLOPs are no line
        (op("mm", shape=(1, 2, 3, 4), flops=48), op("mm")),
        (FusedOp(op("add", "x")), FusedOp(op("add", "y"))),
    ],
)
def test_events_that_are_not_the_same(one: object, two: object) -> None:
    with pytest.raises(NotLinear):
        extrapolated(model(1, one), model(2, two), Line(1, 2, 4))


def test_few_batches_are_traced() -> None:
    cache = ExtrapolatingCache(meta_llama(3), TOKENS, loss_of(None), None)
    settings = Settings(2, 2)

    def at(cache: ExtrapolatingCache, batch: int) -> RankModel:
        return cache.rank_model(resized(TOKENS, batch, 16), settings)

    found = {batch: at(cache, batch) for batch in (1, 2, 4, 8)}
    assert cache.extrapolated >= {8} and 1 not in cache.extrapolated
    anew = cache.traced_anew()
    for batch, computed in found.items():
        assert at(anew, batch).trace == computed.trace
    assert not anew.extrapolated and anew.plan_of(2, True) is cache.plan_of(2, True)


def test_a_model_that_is_not_linear_is_traced() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y @ y.T if len(x) > 1 else y @ y.T * 2

    cache = ExtrapolatingCache(Odd(), (torch.ones(1, 4),), loss_of(lambda y: y.mean()), None)
    for batch in (1, 2, 4):
        cache.rank_model((torch.ones(batch, 4),), Settings(1, 1))
    assert not cache.extrapolated  # one sample does something else, and y @ y.T grows with the square
