"""`local_ops`: modules in whose code single calls change."""

from __future__ import annotations

import abc
import copy
import sys
from typing import Any, Generic, TypeVar

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import lightning_tp as ltp
from lightning_tp._compat import function_modes
from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.core.comm.state import I, R
from lightning_tp.core.modules.call_site import call_site
from lightning_tp.errors import TPError
from lightning_tp.styles import BindContext, PrepareInput, RewrittenCalls, ShardParameter
from lightning_tp.styles.calls.call import Call, Operand
from lightning_tp.styles.calls.rewritten_calls import changes_calls
from lightning_tp.styles.split import Ownership
from lightning_tp.testing import assert_trees_close, fake_world, randomize_, run_ranks

T = TypeVar("T")
HALVES = Ownership(((0, 2), (1, 2)))


class Recorded(TorchFunctionMode):
    """Where the only call of `view` comes from."""

    at: Any = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ == "view":
            self.at = call_site(sys._getframe(1))
        return func(*args, **(kwargs or {}))

    @classmethod
    def of(cls, model: nn.Module, x: Tensor) -> Any:
        with cls() as mode:
            model(x)
        return mode.at


class Net(nn.Module):
    """Plain parameters, one place in the code for two calls, a bias behind the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.o, self.b = nn.Parameter(torch.zeros(4, 8)), nn.Parameter(torch.zeros(8, 4)), nn.Parameter(torch.zeros(4))
        self.scale = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y, z = (t.view(3, 8) for t in (x @ self.w, torch.ones(3, 8)))
        return torch.addmm(self.b, F.gelu(y) * z * self.scale, self.o)


def _trained() -> dict[str, Any]:
    model = randomize_(Net())
    plan = ltp.infer_plan(model, (torch.zeros(3, 4, requires_grad=True),), tp=2)
    ltp.parallelize(model, make_mesh("cpu", 1, 2), plan)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    model(x).pow(2).sum().backward()
    shapes = {n: p._tp_shard.local_shape for n, p in model.named_parameters()}
    return {"grads": {**ltp.full_gradients(model), "x": x.grad}, "shapes": shapes}


def test_plain_parameters_are_split_and_the_gradients_are_those_of_one_process() -> None:
    model = randomize_(Net())
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    model(x).pow(2).sum().backward()
    result = run_ranks(_trained, 2)[0]
    assert result["shapes"] == {"w": (4, 4), "o": (4, 4), "b": (4,), "scale": (8,)}
    ref = {**{n: p.grad for n, p in model.named_parameters()}, "x": x.grad}
    assert_trees_close(result["grads"], ref, rtol=1e-4)  # type: ignore[arg-type]


def test_a_class_with_other_bases_before_the_module_is_taken_too() -> None:
    class Part(nn.Module):
        pass

    class Other(Part, abc.ABC):
        pass

    class Odd(Generic[T], Other):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(2, 4)

    model = Odd()
    sizes = ((1, 1, 2),)
    with fake_world(2, rank=0):
        at = Recorded.of(model, torch.zeros(8))
        RewrittenCalls((Call("view", at, sizes=(sizes, sizes)),)).bind(model, BindContext("", Axis(dist.group.WORLD)))
        assert model(torch.zeros(4)).shape == (2, 2)


def bound(model: nn.Module, *calls: Call, rank: int = 0) -> nn.Module:
    RewrittenCalls(calls).bind(model, BindContext("", Axis(dist.group.WORLD)))
    return model


class Loop(nn.Module):
    """Two calls from one place in the code, in a helper that the module's own functions do not contain."""

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        return [viewed(t) for t in tensors]


def viewed(t: Tensor) -> Tensor:
    return t.view(2, 4)


def test_calls_from_one_place_take_turns_from_the_first_in_each_forward() -> None:
    sizes = ((1, 1, 2),)
    with fake_world(2, rank=0):
        model = Loop()
        at = Recorded.of(model, torch.zeros(8))
        bound(model, Call("view", at), Call("view", at, sizes=(sizes, sizes)))
        for _ in range(2):
            assert [t.shape[1] for t in model(torch.zeros(8), torch.zeros(4))] == [4, 2]
        with pytest.raises(TPError, match="not a multiple"):
            bound(Loop(), Call("view", at, sizes=(((1, 1, 3),),) * 2))(torch.zeros(8))
        assert [t.shape[1] for t in model(torch.zeros(8), torch.zeros(4))] == [4, 2]  # after an error in another one


def test_calls_of_modules_inside_are_left_alone() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return viewed(x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.inner(x), viewed(x[:4])]

    with fake_world(2, rank=0):
        model = Outer()
        with Recorded() as mode, pytest.raises(RuntimeError):
            model(torch.zeros(8))  # the last call is the outer module's
        bound(model, Call("view", mode.at, sizes=(((1, 1, 2),),) * 2))
        assert [t.shape[1] for t in model(torch.zeros(8))] == [4, 2]


def test_a_module_that_another_style_runs_around_is_left_to_the_mode() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(2, 4)

    with fake_world(2, rank=0):
        at = Recorded.of(Plain(), torch.zeros(8))
        call = Call("view", at, sizes=(((1, 1, 2),),) * 2)
        plain, prepared = Plain(), Plain()
        PrepareInput(arrives=I, wanted=R).bind(prepared, BindContext("", Axis(dist.group.WORLD)))
        for model, has_mode in ((plain, False), (prepared, True)):
            bound(model, call)
            assert hasattr(model, "_mode") == has_mode
            assert model(torch.zeros(4)).shape == (2, 2)


def test_a_copy_of_a_module_has_its_calls_changed() -> None:
    with fake_world(2, rank=0):
        model = Loop()
        at = Recorded.of(model, torch.zeros(8))
        twin = copy.deepcopy(bound(model, Call("view", at, sizes=(((1, 1, 2),),) * 2)))
        assert twin(torch.zeros(4))[0].shape == (2, 2)


def test_only_its_own_mode_changes_calls() -> None:
    seen = []

    class Modes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.extend(map(changes_calls, function_modes()))
            return viewed(x)

    with fake_world(2, rank=0):
        model = Modes()
        with Recorded() as mode:
            model(torch.zeros(8))
        bound(model, Call("view", mode.at, sizes=(((1, 1, 2),),) * 2))
        with Recorded():
            model(torch.zeros(4))
    assert seen == [False, False, True]


def test_json_and_text() -> None:
    style = RewrittenCalls(
        (Call("view", (("f", "1:2-3:4"),), operands=(Operand((0,), (1, HALVES), True),), sizes=(((0, 1, 2),), ())),)
    )
    plan = ltp.Plan({"net": style, "w": ShardParameter(0, (((0, 2),), ((2, 4),)))})
    assert ltp.Plan.from_json(plan.to_json()) == plan
    assert str(style) == "local_ops(1 calls: view)"
