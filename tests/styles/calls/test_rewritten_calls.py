"""`local_ops`: modules in whose code single calls change."""

from __future__ import annotations

import abc
import sys
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import lightning_tp as ltp
from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.core.modules.call_site import call_site
from lightning_tp.styles import BindContext, RewrittenCalls, ShardParameter
from lightning_tp.styles.calls.call import Call, Operand
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
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
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


def test_json_and_text() -> None:
    style = RewrittenCalls(
        (Call("view", (("f", "1:2-3:4"),), operands=(Operand((0,), (1, HALVES), True),), sizes=(((0, 1, 2),), ())),)
    )
    plan = ltp.Plan({"net": style, "w": ShardParameter(0, (((0, 2),), ((2, 4),)))})
    assert ltp.Plan.from_json(plan.to_json()) == plan
    assert str(style) == "local_ops(1 calls: view)"
