"""Single calls on one rank's shards, in a fake world of two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import lightning_tp as ltp
from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.state import I, P, State
from lightning_tp.errors import TPError
from lightning_tp.styles.calls.call import Call, Operand
from lightning_tp.styles.calls.run_call import dim_of_item, part_of, run_call
from lightning_tp.styles.split import Ownership
from lightning_tp.testing import fake_world

HALVES = Ownership(((0, 2), (1, 2)))


def call(func: Any, *args: Any, rank: int = 1, kwargs: Any = None, **changes: Any) -> Any:
    with fake_world(2, rank=rank):
        return run_call(Call(getattr(func, "__name__", "f"), (), **changes), func, args, kwargs or {}, Axis(dist.group.WORLD))


def test_the_part_of_an_operand() -> None:
    x = torch.arange(8).view(2, 4)
    assert part_of(x, (1, HALVES), 1).tolist() == [[2, 3], [6, 7]]
    assert part_of(x.view(2, 4, 1), (2, HALVES), 0).flatten().tolist() == [0, 1, 4, 5]
    assert part_of(torch.arange(8), (1, HALVES), 0).tolist() == [0, 1, 4, 5]  # the ownership is repeated
    assert part_of(torch.ones(1), (1, HALVES), 0).shape == (1,)  # it broadcasts
    with pytest.raises(TPError, match="3 is not a multiple of 4"):
        part_of(torch.ones(3), (1, HALVES), 0)


def test_sizes_pieces_and_items_are_this_ranks() -> None:
    x = torch.arange(12.0).view(2, 6)
    assert call(torch.Tensor.view, x, 2, 4, 3, sizes=(((1, 1, 2),), ((1, 1, 2),))).shape == (2, 2, 3)
    assert call(torch.Tensor.view, x, (2, 4, 3), sizes=((), ((1, 2, 0),))).shape == (2, 2, 3)
    assert [p.shape[1] for p in call(torch.split, x, 3, 1, pieces=((1, 5), (2, 4)))] == [2, 4]
    assert [p.shape[1] for p in call(torch.split, x, 3, kwargs={"dim": 1}, pieces=((1, 5), (2, 4)))] == [2, 4]
    assert call(torch.Tensor.__getitem__, x, (0, slice(0, 9)), items=((1, 0, 1, 1), (1, 2, 4, 1))).tolist() == [2.0, 3.0]
    with pytest.raises(TPError, match="length on this rank is 6, and was 4"):
        call(torch.Tensor.__getitem__, x, (..., slice(0, 9)), items=((1, 0, 1, 1, 4), (1, 2, 4, 1, 4)))


def test_a_size_that_is_no_multiple_is_an_error() -> None:
    with pytest.raises(ltp.TPError, match="not a multiple"):
        call(torch.Tensor.view, torch.zeros(6), 3, 2, sizes=(((0, 1, 2),), ((0, 1, 2),)))


def test_an_operand_is_cut_unless_it_has_the_size_of_a_shard() -> None:
    shard, part = torch.ones(2), Operand((1,), (1, HALVES), beside=(0,))
    for whole in (torch.arange(4.0), torch.tensor([2.0, 3.0])):
        assert call(torch.mul, shard, whole, operands=(part,)).tolist() == [2.0, 3.0]
    joined = call(torch.cat, [shard, torch.arange(4.0)], operands=(Operand((0, 1), (1, HALVES)),))
    assert joined.tolist() == [1.0, 1.0, 2.0, 3.0]


def test_an_operand_inside_of_a_tuple_leaves_what_the_code_holds_as_it_is() -> None:
    held = [torch.ones(2), torch.arange(4.0)]
    call(torch.cat, held, operands=(Operand((0, 1), (1, HALVES)),))
    assert held[1].shape == (4,)


@pytest.mark.parametrize("name", ["shape", "size", "numel", "__len__"])
def test_reads_give_full_sizes(name: str) -> None:
    x, sizes = torch.zeros(2, 3), (((0, 2, 1), (1, 5, 0)),) * 2  # twice the first, five for the second
    if name == "shape":
        assert call(torch.Tensor.shape.__get__, x, sizes=sizes) == (4, 5)  # type: ignore[attr-defined]
    elif name == "size":
        assert call(torch.Tensor.size, x, sizes=sizes) == (4, 5)
        assert call(torch.Tensor.size, x, -1, sizes=sizes) == 5
        assert call(torch.Tensor.size, x, kwargs={"dim": 0}, sizes=sizes) == 4
    else:
        assert call(getattr(torch.Tensor, name), x, sizes=sizes) == (20 if name == "numel" else 4)


def _products() -> list[Any]:
    x, w, b = torch.randn(3, 4), torch.randn(4, 5), torch.randn(5)
    images, kernel = torch.randn(2, 4, 6), torch.randn(5, 4, 3)
    return [
        (F.linear, (x, w.t(), b), {}, F.linear(x, w.t()), b),
        (F.linear, (x, w.t()), {"bias": b}, F.linear(x, w.t()), b),
        (F.linear, (x, w.t()), {}, x @ w, torch.zeros(5)),
        (torch.addmm, (b, x, w), {"beta": 0.5, "alpha": 3}, 3 * x @ w, 0.5 * b),
        (torch.baddbmm, (b, x[None], w[None]), {}, (x @ w)[None], b),
        (torch.addmv, (b, w.t(), x[0]), {}, w.t() @ x[0], b),
        (torch.conv1d, (images, kernel, b), {}, torch.conv1d(images, kernel), b[:, None]),
        (torch.matmul, (x, w), {}, x @ w, torch.zeros(5)),
    ]


@pytest.mark.parametrize("number", range(8))
def test_a_bias_is_added_once_to_partial_sums(number: int) -> None:
    func, args, kwargs, product, bias = _products()[number]

    def run(rank: int, to: State) -> Tensor:
        out: Tensor = call(func, *args, rank=rank, kwargs=dict(kwargs), leave=True, to=to)
        return out

    torch.testing.assert_close(run(0, P), product + bias)
    torch.testing.assert_close(run(1, P), product)
    torch.testing.assert_close(run(1, I), product + bias)  # the all-reduce of a fake world sends nothing


def test_the_dim_that_an_item_is_about() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert dim_of_item((mask, slice(0, 1)), 1, ndim=3) == 2
    assert dim_of_item((0, ..., slice(0, 1)), 2, ndim=4) == 3
    assert dim_of_item((None, slice(0, 1)), 0, ndim=2) is None
