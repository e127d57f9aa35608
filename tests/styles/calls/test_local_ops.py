"""`local_ops` and `shard`: patterns, places in the code, and single calls on one rank's shards."""

from __future__ import annotations

import abc
import sys
from typing import Any, Generic, TypeVar

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import lightning_tp as ltp
from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.core.modules.call_site import call_site
from lightning_tp.errors import TPError
from lightning_tp.styles import BindContext
from lightning_tp.styles.calls.call import Call, Operand
from lightning_tp.styles.calls.local_ops import LocalOps, ShardParameter
from lightning_tp.styles.calls.run_call import part_of, run_call
from lightning_tp.styles.split import Ownership
from lightning_tp.testing import assert_trees_close, fake_world, randomize_, run_ranks

T = TypeVar("T")
HALVES = Ownership(((0, 2), (1, 2)))


def call(func: Any, *args: Any, rank: int = 1, **changes: Any) -> Any:
    with fake_world(2, rank=rank):
        return run_call(Call(getattr(func, "__name__", "f"), (), **changes), func, args, {}, Axis(dist.group.WORLD))


def test_a_pattern_is_the_shortest_that_is_repeated() -> None:
    pattern = Ownership.of(torch.tensor([0, 0, 1, 1] * 3))
    assert pattern == HALVES
    assert (pattern.period, pattern.local(12, 0), pattern.index(1, 8).tolist()) == (4, 6, [2, 3, 6, 7])


def test_what_every_rank_has_counts_for_each() -> None:
    pattern = Ownership(((0, 2), (1, 2), (-1, 3)))
    assert pattern.ranges(0) == ((0, 2), (4, 7))
    assert pattern.ranges(1) == ((2, 7),)
    assert pattern.count(1) == 5


def test_the_part_of_an_operand() -> None:
    x = torch.arange(8).view(2, 4)
    assert part_of(x, (1, HALVES), 1).tolist() == [[2, 3], [6, 7]]
    assert part_of(x.view(2, 4, 1), (2, HALVES), 0).flatten().tolist() == [0, 1, 4, 5]
    assert part_of(torch.arange(8), (1, HALVES), 0).tolist() == [0, 1, 4, 5]  # the pattern is repeated
    assert part_of(torch.ones(1), (1, HALVES), 0).shape == (1,)  # it broadcasts
    with pytest.raises(TPError, match="3 is no multiple of 4"):
        part_of(torch.ones(3), (1, HALVES), 0)


def test_sizes_pieces_and_items_are_this_ranks() -> None:
    x = torch.arange(12.0).view(2, 6)
    assert call(torch.Tensor.view, x, 2, 4, 3, sizes=(((1, 1, 2),), ((1, 1, 2),))).shape == (2, 2, 3)
    assert [p.shape[1] for p in call(torch.split, x, 3, 1, pieces=((1, 5), (2, 4)))] == [2, 4]
    assert call(torch.Tensor.__getitem__, x, (0, slice(0, 9)), items=((1, 0, 1, 1), (1, 2, 4, 1))).tolist() == [2.0, 3.0]
    with pytest.raises(TPError, match="dim of 6 on this rank, which had 4"):
        call(torch.Tensor.__getitem__, x, (..., slice(0, 9)), items=((1, 0, 1, 1, 4), (1, 2, 4, 1, 4)))


def test_a_size_that_is_no_multiple_is_an_error() -> None:
    with pytest.raises(ltp.TPError, match="not a multiple"):
        call(torch.Tensor.view, torch.zeros(6), 3, 2, sizes=(((0, 1, 2),), ((0, 1, 2),)))


def test_places_do_not_depend_on_how_often_code_ran() -> None:
    found = []

    def here() -> Any:
        return call_site(sys._getframe())

    def caller() -> Any:
        return tuple(here() for _ in range(1))

    for _ in range(64):
        found.append(caller())
    assert len(set(found)) == 1


def test_two_places_in_one_line_differ() -> None:
    def here() -> Any:
        return call_site(sys._getframe())

    a, b = here(), here()
    assert a != b


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
        LocalOps((Call("view", at, sizes=(sizes, sizes)),)).bind(model, BindContext("", Axis(dist.group.WORLD)))
        assert model(torch.zeros(4)).shape == (2, 2)


def test_json_and_text() -> None:
    style = LocalOps((Call("view", (("f", "1:2-3:4"),), operands=(Operand((0,), (1, HALVES), True),), sizes=(((0, 1, 2),), ())),))
    plan = ltp.Plan({"net": style, "w": ShardParameter(0, (((0, 2),), ((2, 4),)))})
    assert ltp.Plan.from_json(plan.to_json()) == plan
    assert str(style) == "local_ops(1 calls: view)"
