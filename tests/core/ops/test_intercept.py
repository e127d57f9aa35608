"""Calls that draw are handed to a policy: in a whole step, or while single modules run; and are known by their places."""

from __future__ import annotations

import copy
import sys
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import dropout as dropout_under_another_name
from torch.utils.checkpoint import checkpoint

from lightning_tp.core.ops.intercept import (
    CallInterceptor,
    PerRankCall,
    intercept_call,
    is_intercepting,
    key_of,
    module_calling,
    per_rank_calls_of,
    run_checkpointed,
)
from lightning_tp.core.ops.random_calls import FUNCTIONAL, FunctionCall
from lightning_tp.core.ops.replication import CallKey

ORIGINALS = dict(FUNCTIONAL)


class Recorder(CallInterceptor):
    """A policy that notes the calls and makes them."""

    def __init__(self) -> None:
        super().__init__(SimpleNamespace(rank=3))  # type: ignore[arg-type]
        self.calls: list[tuple[str, str | None]] = []
        self.keys: list[CallKey] = []
        self.known: list[bool] = []
        self.callers: list[tuple[nn.Module | None, bool]] = []
        self.others: list[str] = []

    def forget(self) -> None:
        for noted in (self.calls, self.keys, self.callers, self.known):
            noted.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        memo[id(self)] = twin = Recorder()
        return twin

    def run_random_call(self, call: FunctionCall, frame: FrameType) -> Any:
        self.calls.append((call.name, self.functional_name))
        self.keys.append(key_of(call, frame))
        self.callers.append(module_calling(frame))
        running = self.running
        self.known.append(bool(running) and self.keys[-1] in running[-1])
        F.dropout(torch.ones(1), 0.5, False)  # part of this call, whoever makes it
        return call.run()

    def run_other_call(self, call: FunctionCall) -> Any:
        self.others.append(call.name)
        return call.run()


def in_place() -> bool:
    return all(F.__dict__[name] is func for name, func in ORIGINALS.items()) and not is_intercepting()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(F.dropout(x, 0.2, self.training))


class Other(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return dropout_under_another_name(x, 0.2, self.training)


X = torch.ones(4)


def test_all_calls_of_a_step() -> None:
    policy = Recorder()
    assert in_place()
    with pytest.raises(ZeroDivisionError), policy.all_calls():
        assert is_intercepting() and policy.mode_active and F.dropout is not ORIGINALS["dropout"]
        F.dropout(X)
        dropout_under_another_name(X)
        torch.dropout(X, 0.5, True)
        torch.rand(3).add(1)
        Block()(X)
        F.scaled_dot_product_attention(X[None, :, None], X[None, :, None], X[None, :, None], dropout_p=0.1)
        1 / 0  # noqa: B018
    names = ["dropout", "dropout", "dropout", "rand", "dropout", "dropout", "scaled_dot_product_attention"]
    by_name = ["dropout", None, None, None, "dropout", "dropout", "scaled_dot_product_attention"]
    assert policy.calls == list(zip(names, by_name))
    assert in_place() and not policy.mode_active and policy.others == []
    F.dropout(X)
    assert len(policy.calls) == 7


def test_other_calls_while_noise_is_followed() -> None:
    policy = Recorder()
    with policy.all_calls():
        X.add(1)
        policy.noise.add(X, None)  # type: ignore[arg-type]
        X.mul(2)
    assert policy.others == ["mul"]


def known(block: nn.Module, policy: Recorder, *, functional_name: str | None = "dropout", index: int = 0) -> CallKey:
    """Intercept the call of a block that came as number `index`."""
    policy.forget()
    with policy.all_calls():
        block(X)
    key = policy.keys[index]
    intercept_call(policy.callers[index][0], key, PerRankCall(functional_name), policy)  # type: ignore[arg-type]
    policy.forget()
    return key


def test_known_calls_of_a_module_by_the_wrappers() -> None:
    policy, block = Recorder(), Block()
    key = known(block, policy)
    assert per_rank_calls_of(block) == {key: PerRankCall("dropout")} and per_rank_calls_of(block.drop) == {}
    assert isinstance(block, Block) and type(block) is not Block
    F.dropout(X)
    assert policy.calls == []  # outside of it
    inside: list[bool] = []
    block.drop.register_forward_hook(lambda *_: inside.append(is_intercepting() and not policy.mode_active))
    block(X)
    assert inside == [True]
    assert policy.calls == [("dropout", None)] * 2  # the layer's own call is seen as well, since it runs inside
    assert policy.known == [True, False] and policy.keys[0] == key
    assert [module for module, _ in policy.callers] == [block, block.drop]
    assert in_place() and policy.running == []
    block.drop = Failing()
    with pytest.raises(KeyError):
        block(X)
    assert in_place() and policy.running == []


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError


def test_known_calls_of_a_module_by_the_mode() -> None:
    policy, other = Recorder(), Other()
    known(other, policy, functional_name=None)
    modes: list[bool] = []
    other.register_forward_pre_hook(lambda *_: modes.append(policy.mode_active))
    other(X)
    assert policy.calls == [("dropout", None)] and policy.known == [True]
    assert modes == [False] and in_place() and not policy.mode_active
    # once one call of a module needs the mode, it is on for all of them
    block = Block()
    known(block, policy)
    intercept_call(block, ("rand", ()), PerRankCall(None), policy)
    block.drop.register_forward_hook(lambda *_: modes.append(policy.mode_active))
    block(X)
    assert modes == [False, True] and policy.known == [True, False]


def test_a_module_inside_a_module() -> None:
    """The innermost's calls are looked up; the outer one's afterwards again."""
    policy, outer = Recorder(), nn.Sequential(Other(), Block())
    known(outer[0], policy, functional_name=None)
    known(outer[1], policy)
    outer(X)
    assert policy.calls == [("dropout", None)] * 3 and policy.known == [True, True, False]
    assert in_place()


def test_a_layer_of_dropout_draws_from_the_ranks_stream() -> None:
    from lightning_tp.core.ops.rng import on_rank_stream

    policy, layer = Recorder(), nn.Dropout(0.5)
    known(layer, policy)
    x = torch.ones(100)
    torch.manual_seed(0)
    expected = on_rank_stream(3, x.device, lambda: F.dropout(x, 0.5))
    torch.manual_seed(0)
    assert torch.equal(layer(x), expected) and policy.calls == []
    state = torch.get_rng_state()
    assert layer.eval()(x) is not None and torch.equal(layer(x), x) and torch.equal(state, torch.get_rng_state())
    layer.train()
    policy.forget()
    with policy.all_calls():
        layer(x)
    assert policy.calls == [("dropout", "dropout")]
    exact = nn.Dropout(0.5)
    intercept_call(exact, ("dropout", ()), PerRankCall("dropout", region=object()), policy)  # type: ignore[arg-type]
    policy.calls.clear()
    exact(x)
    assert policy.calls == [("dropout", None)]  # the policy has to see it


def test_a_copy_is_intercepted_by_the_copy_of_its_policy() -> None:
    policy = Recorder()
    model = nn.Sequential(Block(), Other())
    known(model[0], policy)
    known(model[1], policy, functional_name=None)
    twin = copy.deepcopy(model)
    mine, theirs = (m[0].__dict__["_per_rank_calls"].interceptor for m in (model, twin))
    assert mine is policy and theirs is not mine and isinstance(theirs, Recorder)
    assert twin[1].__dict__["_per_rank_calls"].interceptor is theirs
    twin(X)
    assert policy.calls == [] and theirs.known == [True, False, True]


def test_the_module_that_calls() -> None:
    policy, block = Recorder(), Block()
    x = X.clone().requires_grad_()

    def function(y: Tensor) -> Tensor:
        return F.dropout(y, 0.5)

    with policy.all_calls():
        F.dropout(X)
        checkpoint(block, x, use_reentrant=False)
        checkpoint(function, x, use_reentrant=False)
        checkpoint(run_checkpointed, block, block.forward, x, use_reentrant=False)
    assert policy.callers == [
        (None, False),
        (block, False),
        (block.drop, False),
        (None, True),
        (block, False),
        (block.drop, False),
    ]
    own, checkpointed = policy.keys[1], policy.keys[4]
    assert own == checkpointed  # whether or not the block is checkpointed
    assert module_calling(sys._getframe()) == (None, False)


def test_a_block_that_is_recomputed_is_intercepted_both_times() -> None:
    policy, block = Recorder(), Block()
    known(block, policy)
    out = checkpoint(run_checkpointed, block, super(type(block), block).forward, X.clone().requires_grad_(), use_reentrant=False)
    out.sum().backward()
    assert policy.known == [True, False, True, False]
    assert run_checkpointed(Other(), lambda x: x, X) is X


def test_two_calls_in_one_module_have_two_keys() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x) + F.dropout(x)

    policy = Recorder()
    with policy.all_calls():
        Twice()(X)
        Twice()(X)
    a, b, c, d = policy.keys
    assert a == c and b == d and a != b


def test_a_module_that_the_mode_knows_inside_an_observed_step() -> None:
    policy, other = Recorder(), Other()
    known(other, policy, functional_name=None)
    with policy.all_calls():
        other(X)
        assert policy.mode_active and policy.running == []  # the step goes on
        F.dropout(X)
    assert policy.calls == [("dropout", None), ("dropout", "dropout")] and in_place()
