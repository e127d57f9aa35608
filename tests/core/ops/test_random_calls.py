"""Which calls draw random numbers, what their arguments are, and runs without dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_tp.core.ops import random_calls
from lightning_tp.core.ops.random_calls import (
    CHANGING,
    GENERATING,
    SDPA,
    FunctionCall,
    comparable_runs,
    without_dropout,
)
from lightning_tp.errors import TPError

X = torch.ones(2, 3)


def call(func: Any, *args: Any, **kwargs: Any) -> FunctionCall:
    return FunctionCall(func, args, kwargs)


@pytest.mark.parametrize(
    ("what", "is_random"),
    [
        (call(F.dropout, X), True),
        (call(F.dropout, X, 0.0), False),
        (call(F.dropout, X, p=0.0), False),
        (call(F.dropout, X, 0.5, False), False),
        (call(F.dropout, X, training=False), False),
        (call(F.dropout, input=X, p=0.1, training=True), True),
        (call(torch.native_dropout, X, 0.5, train=False), False),
        (call(torch.native_dropout, X, 0.5, True), True),
        (call(F.alpha_dropout, X, 0.2, True), True),
        (call(SDPA, X, X, X), False),
        (call(SDPA, X, X, X, dropout_p=0.1), True),
        (call(SDPA, X, X, X, None, 0.1), True),
        (call(SDPA, X, X, X, None, 0.0, True), False),
        (call(F.rrelu, -X), False),
        (call(F.rrelu, -X, training=True), True),
        (call(F.rrelu, -X, 0.1, 0.3, True), True),
        (call(torch.multinomial, X, 1), True),
        (call(torch.rand, 3), True),
        (call(torch.Tensor.bernoulli_, X, 0.5), True),
    ],
)
def test_whether_a_call_draws(what: FunctionCall, is_random: bool) -> None:
    assert what.is_random is is_random
    before = torch.get_rng_state()
    args = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in what.args)
    FunctionCall(what.func, args, what.kwargs).run()
    assert torch.equal(before, torch.get_rng_state()) is not is_random  # as torch says


def test_arguments_by_position_and_by_name() -> None:
    assert call(F.dropout, X).p == 0.5 and call(F.dropout, X, 0.1).p == call(F.dropout, X, p=0.1).p == 0.1
    assert call(SDPA, X, X, X).p == 0.0 and call(SDPA, X, X, X, None, 0.3).p == 0.3
    assert call(F.dropout, X).argument("inplace", 3) is False and call(F.dropout, X, 0.1, True, True).argument("inplace", 3) is True
    assert call(F.dropout, X, 0.1).input is call(F.dropout, input=X).input is X
    assert call(SDPA, query=X, key=-X, value=X).input is call(F.gumbel_softmax, logits=X).input is X
    assert [t is X for t in call(torch.add, 2, X, other=X).tensors] == [True, True]
    assert call(torch.rand, 3, device="meta").device.type == "meta" and call(torch.rand_like, X).device.type == "cpu"
    assert call(SDPA).name == "scaled_dot_product_attention"


def test_no_function_is_of_both_kinds() -> None:
    assert not CHANGING & GENERATING


def test_nothing_is_dropped() -> None:
    """By whatever name; the call itself is not made, where it would change something."""
    q = torch.randn(1, 2, 4, 8)
    with without_dropout():
        assert F.dropout(X, 0.5) is X and torch.dropout(X, 0.5, True) is X and nn.Dropout(0.9)(X) is X
        assert F.alpha_dropout(X, 0.5, True) is X and F.dropout2d(X[None, None], 0.5).equal(X[None, None])
        state = torch.get_rng_state()
        for args in ((), (None, 0.5), (None, 0.5, True)):
            kwargs = {} if args else {"dropout_p": 0.5, "is_causal": True}
            causal = True if not args else len(args) == 3
            assert torch.equal(F.scaled_dot_product_attention(q, q, q, *args, **kwargs), SDPA(q, q, q, is_causal=causal))
        assert torch.equal(torch.get_rng_state(), state)
        assert F.dropout(X, 0.5, False).equal(X)
        assert torch.rand(3).unique().numel() == 3 and F.rrelu(-X, training=True).unique().numel() > 1  # drawn all the same
    assert not F.dropout(torch.ones(1000), 0.5).all()


def test_runs_that_are_compared_leave_buffers_and_random_numbers() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    model.register_buffer("on_meta", torch.empty(3, device="meta"))
    mean, state = model[0].running_mean.clone(), torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), comparable_runs(model):
        x = torch.rand(4, 3)
        assert (model(x) != 0).all()
        assert not torch.equal(model[0].running_mean, mean)
        1 / 0  # noqa: B018
    assert torch.equal(model[0].running_mean, mean) and torch.equal(torch.get_rng_state(), state)


def test_the_other_functions_pass() -> None:
    class Names(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    with Names(), without_dropout():
        F.dropout(X.add(1), 0.5)
    assert names == ["add"]


def test_weights_that_a_model_writes_into_are_as_before() -> None:
    model = nn.Linear(3, 3)
    weight, bias = model.weight.clone(), model.bias.clone()
    with comparable_runs(model), torch.no_grad():
        model.weight.mul_(2)
        model.bias.data = model.bias.data + 1
    assert torch.equal(model.weight, weight) and torch.equal(model.bias, bias)


def test_a_model_too_large_to_copy_may_not_write_into_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_calls, "MOST_COPIED", 4)
    model = nn.Linear(3, 3)
    with comparable_runs(model):
        pass
    with pytest.raises(TPError, match="writes into the parameter `bias`"), comparable_runs(model), torch.no_grad():
        model.bias.add_(1)
