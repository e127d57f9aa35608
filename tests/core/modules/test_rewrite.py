"""Functions with single calls handed over: the same results, the same lines, and left alone where the source does not say enough."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import lightning_tp as ltp
from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.core.modules.call_site import call_site
from lightning_tp.core.modules.rewrite import rewritten
from lightning_tp.styles import BindContext, RewrittenCalls
from lightning_tp.styles.calls.call import Call
from lightning_tp.testing import fake_world, randomize_

HEADS = 4


class Places(TorchFunctionMode):
    """The places of the calls of these names."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names, self.found = names, []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.names:
            self.found.append((name, call_site(sys._getframe(1))))
        return func(*args, **(kwargs or {}))


class Attention(nn.Module):
    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.qkv, self.out, self.dim = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), dim

    def heads(self, q: Tensor, k: Tensor, v: Tensor, batch: int, *, scale: float = 1.0) -> list[Tensor]:
        """In a comprehension, over several lines."""
        return [
            (
                t.view(batch, -1, HEADS, self.dim // HEADS)
                .transpose(1, 2)  # not the last call of the line
            ) * scale
            for t in (q, k, v)
        ]  # fmt: skip

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.qkv(x).split(self.dim, dim=2); q, k, v = self.heads(q, k, v, B)  # fmt: skip  # noqa: E702
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous().view(B, T, C)
        if fail:
            raise KeyError("here")
        return self.out(y)


class Twice(Attention):
    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).split(self.dim, dim=2)
        q, k, _ = self.heads(q, k, v, B)
        _, _, v = self.heads(v, v, v, B)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous().view(B, T, C))


class Above(Attention):
    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        return super().forward(x, fail)


def bound(module: nn.Module) -> nn.Module:
    """With the calls that inference changes, on rank 1 of two."""
    plan = ltp.infer_plan(nn.Sequential(module), (torch.randn(2, 6, 16),), tp=2)
    style = next(r.style for r in plan.rules if r.style.name == "local_ops")
    with fake_world(2, rank=1):
        style.bind(module, BindContext("attention", Axis(make_mesh("cpu", 1, 2)["tensor_parallel"].get_group())))
    return module


def test_calls_are_handed_over_and_nothing_else_is_looked_at() -> None:
    module = bound(Attention())
    assert type(module).forward is not Attention.forward and type(module).heads is not Attention.heads
    assert "_mode" not in module.__dict__
    module.qkv = nn.Linear(16, 24)  # this rank's heads
    module.out = nn.Linear(8, 16)
    with Places("view") as places:
        assert module(torch.randn(2, 6, 16)).shape == (2, 6, 16)
    assert len(places.found) == 4


def test_lines_defaults_and_globals_are_those_of_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    module = bound(Attention())
    module.qkv, module.out = nn.Linear(16, 24), nn.Linear(8, 16)
    with pytest.raises(KeyError) as error:
        module(torch.randn(2, 6, 16), fail=True)
    last = traceback.extract_tb(error.value.__traceback__)[-1]
    assert last.filename == __file__ and last.line == 'raise KeyError("here")'
    assert type(module).heads.__kwdefaults__ == {"scale": 1.0} and type(module).heads.__doc__ == Attention.heads.__doc__
    monkeypatch.setitem(Attention.forward.__globals__, "HEADS", 3)
    with pytest.raises(ltp.TPError, match="not a multiple"):
        module(torch.randn(2, 6, 16))


@pytest.mark.parametrize("kind", [Twice, Above])
def test_code_that_does_not_say_enough_is_left_to_the_mode(kind: type[Attention]) -> None:
    module = bound(kind())
    assert "_mode" in module.__dict__ and type(module).heads is Attention.heads


def test_a_module_in_a_module_of_its_kind_is_left_to_the_mode() -> None:
    outer = Attention()
    outer.inner = Attention()
    assert "_mode" in bound(outer).__dict__


def test_closures_and_code_without_source() -> None:
    width = 8

    class Closed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(-1, width)

    with Places("view") as places:
        Closed()(torch.zeros(2, 8))
    made = rewritten(Closed, places.found, "_seen")
    assert made is not None
    seen = []

    def spy(self: Any, number: int, func: Any, *args: Any) -> Tensor:
        seen.append((number, func.__name__, args))
        return func(*args)

    module = type("Seen", (Closed,), {**made, "_seen": spy})()
    assert module(torch.zeros(2, 8)).shape == (2, 8)
    assert seen == [(0, "view", (-1, 8))]

    space: dict[str, Any] = {"nn": nn}
    exec("class Typed(nn.Module):\n    def forward(self, x):\n        return x.view(-1, 8)", space)
    assert rewritten(space["Typed"], [("view", (("forward", "1:15-1:28"),))], "_seen") is None
    assert rewritten(Closed, [("view", (("forward", "1:19-1:33"),))], "_seen") is None  # no call ends there
    assert rewritten(Closed, [("softmax", places.found[0][1])], "_seen") is None  # torch rearranges what it is given


def test_the_calls_of_a_rule_are_numbered_as_they_stand() -> None:
    module = nn.Sequential(Attention())
    randomize_(module)
    style = next(
        r.style for r in ltp.infer_plan(module, (torch.randn(2, 6, 16),), tp=2).rules if isinstance(r.style, RewrittenCalls)
    )
    assert all(isinstance(c, Call) for c in style.calls)
    made = rewritten(Attention, [(c.name, c.at) for c in style.calls], "_local_call")
    assert made is not None and sorted(made) == ["forward", "heads"]
