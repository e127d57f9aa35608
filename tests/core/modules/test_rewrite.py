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
from lightning_tp.core.modules.rewrite import rewrite_methods
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
    made = rewrite_methods(Closed, places.found, "_seen")
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
    assert rewrite_methods(space["Typed"], [("view", (("forward", "1:15-1:28"),))], "_seen") is None
    assert rewrite_methods(Closed, [("view", (("forward", "1:19-1:33"),))], "_seen") is None  # no call ends there
    assert rewrite_methods(Closed, [("softmax", places.found[0][1])], "_seen") is None  # torch rearranges what it is given


class Unshared(nn.Module):
    def half(self, x: Tensor) -> Tensor:
        return x.view(-1, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.half(x) + 1


class Shared(nn.Module):
    def half(self, x: Tensor) -> Tensor:
        return x.view(-1, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.half(x) + self.half(x + 1)


class SharedElsewhere(Unshared):
    def other(self, x: Tensor) -> Tensor:
        return self.half(x)


class Passed(Unshared):
    def forward(self, x: Tensor) -> Tensor:
        return next(map(lambda y: y.view(-1, 8), [x]))


class Assigned(Unshared):
    def forward(self, x: Tensor) -> Tensor:
        y = x.view(-1, 8)
        self = None  # noqa: F841
        return y


class Superclass(Unshared):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(-1, 8)


@pytest.mark.parametrize(
    ("kind", "rewritten"),
    [(Unshared, ["half"]), (Shared, None), (SharedElsewhere, None), (Passed, None), (Assigned, None), (Superclass, None)],
)
def test_a_method_that_is_called_from_elsewhere_is_left_alone(kind: type[nn.Module], rewritten: list[str] | None) -> None:
    """The call that is to be changed is known from one place; from another it may have to stay. And code that is not plain."""
    with Places("view") as places:
        kind()(torch.zeros(2, 8))
    made = rewrite_methods(kind, places.found[-1:], "_seen")
    assert (None if made is None else list(made)) == rewritten


def test_two_calls_at_one_place_are_left_alone() -> None:
    class Loop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = x.view(-1, 8)
            return x

    with Places("view") as places:
        Loop()(torch.zeros(2, 8))
    assert len(places.found) == 2 and rewrite_methods(Loop, places.found, "_seen") is None
    assert rewrite_methods(Loop, places.found[:1], "_seen") is not None


def test_reads_of_shapes_and_keywords() -> None:
    class Sizes(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x.shape, x.expand(*x.shape[:1], size := -1), x.chunk(2, dim=1), size

    with Places("__get__", "expand", "chunk") as places:
        Sizes()(torch.zeros(2, 8))
    made = rewrite_methods(Sizes, places.found, "_seen")
    assert made is not None
    seen: list[Any] = []

    def spy(self: Any, number: int, func: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((number, kwargs, args[0] if func is None else args))
        return args[0].shape if func is None else func(*args, **kwargs)

    x = torch.zeros(2, 8)
    shape, expanded, _, size = type("Seen", (Sizes,), {**made, "_seen": spy})()(x)
    assert shape == expanded.shape == (2, 8) and size == -1
    assert [number for number, *_ in seen] == [0, 1, 2, 3]
    assert seen[0][2] is seen[1][2] is x and seen[2][2] == (2, -1) and seen[3][1:] == ({"dim": 1}, (2,))


def test_the_calls_of_a_rule_are_numbered_as_they_stand() -> None:
    module = nn.Sequential(Attention())
    randomize_(module)
    style = next(
        r.style for r in ltp.infer_plan(module, (torch.randn(2, 6, 16),), tp=2).rules if isinstance(r.style, RewrittenCalls)
    )
    assert all(isinstance(c, Call) for c in style.calls)
    made = rewrite_methods(Attention, [(c.name, c.at) for c in style.calls], "_local_call")
    assert made is not None and sorted(made) == ["forward", "heads"]
