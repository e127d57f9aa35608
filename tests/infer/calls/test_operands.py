from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_tp.infer.calls.operands import check_broadcast, combine, convolve, einsum
from lightning_tp.infer.calls.recorded_call import NotOnShards
from lightning_tp.styles.calls.call import Operand
from tests.infer.calls.recorded import halves, recorded

X, ROW = torch.zeros(2, 3, 8), torch.arange(8.0)
OWNED = halves(2).ownership


def test_a_whole_operand_is_cut_beside_the_split_dim() -> None:
    call = recorded(torch.mul, X, ROW, layouts={0: halves(2)}, results=halves(2))
    assert combine(call).call.operands == (Operand((1,), (1, OWNED), beside=(0,)),)
    call = recorded(torch.mul, ROW[:, None, None].expand(8, 2, 3), X.permute(2, 0, 1), layouts={1: halves(0)}, results=halves(0))
    assert combine(call).call.operands == (Operand((0,), (3, OWNED), beside=(1,)),)
    call = recorded(torch.where, X > 0, X, ROW, layouts={0: halves(2), 1: halves(2)}, results=halves(2))
    assert [o.path for o in combine(call).call.operands] == [(2,)]


@pytest.mark.parametrize("other", [torch.ones(1), torch.ones(3, 1), torch.ones(())])
def test_an_operand_that_broadcasts_along_the_split_dim_stays(other: Tensor) -> None:
    call = recorded(torch.mul, X, other, layouts={0: halves(2)}, results=halves(2))
    assert not combine(call).call.changes


def test_a_split_parameter_is_a_shard_already() -> None:
    call = recorded(torch.mul, X, ROW, layouts={0: halves(2)}, results=halves(2), split=(1,))
    assert not combine(call).call.changes


@pytest.mark.parametrize(("sharded_result", "partial", "enters"), [(True, False, True), (False, True, True), (False, False, False)])
def test_ranks_have_partial_gradients_of_what_is_combined_with_shards(sharded_result: bool, partial: bool, enters: bool) -> None:
    results = halves(2) if sharded_result else None
    call = recorded(torch.mul, X, torch.ones(1), layouts={0: results}, results=results, equal=(1,), partial_results=partial)
    assert combine(call).call.operands == ((Operand((1,), None, enter=True),) if enters else ())


def test_products_have_rows_and_columns_of_their_own() -> None:
    a, b = torch.zeros(8, 4), torch.zeros(4, 8)
    assert not combine(recorded(torch.matmul, a, b, layouts={0: halves(0)}, results=halves(0))).call.changes
    batched = recorded(torch.bmm, torch.zeros(8, 3, 4), torch.zeros(8, 4, 5), layouts={0: halves(0)}, results=halves(0))
    assert combine(batched).call.operands == (Operand((1,), (3, OWNED), beside=(0,)),)
    added = recorded(torch.addmm, torch.zeros(8), a.new_zeros(2, 4), b, layouts={2: halves(1)}, results=halves(1))
    assert combine(added).call.operands == (Operand((0,), (1, OWNED), beside=(2,)),)


def test_a_bias_is_cut_and_an_input_is_not() -> None:
    call = recorded(F.linear, torch.zeros(3, 8), torch.zeros(8, 8), ROW, layouts={}, results=halves(1), split=(1,))
    assert combine(call).call.operands == (Operand((2,), (1, OWNED)),)


def test_what_lies_beside_a_summed_dim_is_not_cut() -> None:
    call = recorded(torch.matmul, X, torch.zeros(8, 8), layouts={0: halves(2)}, split=(1,), products=(("in", "w"),))
    assert not combine(call).call.changes


def test_attention_is_cut_by_heads() -> None:
    q, mask = torch.zeros(1, 8, 3, 2), torch.zeros(1, 8, 3, 3)
    heads = {0: halves(1), 1: halves(1), 2: halves(1)}
    call = recorded(F.scaled_dot_product_attention, q, q.clone(), q.clone(), mask, layouts=heads, results=halves(1))
    assert combine(call).call.operands == (Operand((3,), (3, OWNED), beside=(0,)),)
    call = recorded(F.scaled_dot_product_attention, q, q.clone(), q.clone(), mask[0, 0], layouts=heads, results=halves(1))
    assert not combine(call).call.changes
    fewer = recorded(
        F.scaled_dot_product_attention,
        q,
        q[:, :2],
        q[:, :2],
        layouts={0: halves(1)},
        results=halves(1),
        kwargs={"enable_gqa": True},
    )
    with pytest.raises(NotOnShards, match="2 heads beside 8"):
        combine(fewer)


def test_tensors_that_are_joined_are_cut_if_they_have_the_size_of_the_split_dim() -> None:
    for other, cut in ((X, True), (torch.zeros(2, 3, 4), False)):
        call = recorded(torch.cat, [X.clone(), other], -2 if cut else -1, layouts={(0, 0): halves(2)}, results=halves(2))
        assert combine(call).call.operands == ((Operand((0, 1), (1, OWNED), beside=(0, 0)),) if cut else ())


def test_an_equation_says_which_dims_belong_together() -> None:
    x, w = torch.zeros(2, 3, 8), torch.zeros(8, 5)
    call = recorded(torch.einsum, "bth, hd -> bhtd", x, w, layouts={1: halves(2)}, results=halves(1), equal=(2,))
    assert einsum(call).call.operands == (Operand((2,), (2, OWNED), enter=True),)
    square = torch.zeros(8, 8)
    call = recorded(torch.einsum, "ij,jk->ik", square, square.clone(), layouts={1: halves(0)}, results=halves(0))
    assert not einsum(call).call.changes  # j is not split
    call = recorded(torch.einsum, "ij,jk->ik", square, square.clone(), layouts={1: halves(0)}, results=halves(0), split=(2,))
    assert not einsum(call).call.changes


def test_an_equation_that_can_not_be_read_needs_all_operands_to_be_followed() -> None:
    x, w = torch.zeros(2, 8), torch.zeros(2, 8)
    with pytest.raises(NotOnShards, match=r"\.\.\.h"):
        einsum(recorded(torch.einsum, "...h,...h->...h", x, w, layouts={1: halves(1)}, results=halves(1)))
    both = recorded(torch.einsum, "...h,...h->...h", x, w, layouts={1: halves(1), 2: halves(1)}, results=halves(1))
    assert not einsum(both).call.changes


def test_the_bias_and_the_groups_of_a_convolution() -> None:
    x, weight, bias = torch.zeros(2, 4, 6), torch.zeros(8, 4, 3), torch.zeros(8)
    call = recorded(F.conv1d, x, weight, bias, results=halves(1), split=(1,))
    assert convolve(call).call.operands == (Operand((2,), (1, OWNED)),) and not convolve(call).call.groups
    grouped = recorded(F.conv1d, x, torch.zeros(8, 1, 3), bias, 1, 0, 1, 4, results=halves(1), split=(1,), equal=(0,))
    change = convolve(grouped).call
    assert change.groups == (2, 2)
    assert change.operands == (Operand((0,), (2, halves(1, 4).ownership), True), Operand((2,), (1, OWNED)))
    assert convolve(recorded(F.conv1d, x, weight, bias, results=halves(0, 2), split=(1,))).call.groups == ()  # along the batch


def test_operands_have_to_broadcast_where_a_call_is_not_tried() -> None:
    def check(func: Any, *args: Any) -> None:
        call = recorded(func, *args, layouts={0: halves(2)}, results=halves(2))
        check_broadcast(call, call.given[0].tensor, halves(2))

    check(torch.mul, X, ROW)
    check(torch.mul, X, torch.ones(3, 1))
    check(lambda x, y: x.clone(), X, torch.zeros(5, 7))  # has no size of the split dim
    with pytest.raises(NotOnShards, match="do not broadcast"):
        check(lambda x, y: x.clone(), X, torch.zeros(8, 5))
    with pytest.raises(NotOnShards, match="do not broadcast"):
        check(lambda x, y: x.sum(0), X, torch.zeros(3, 8))  # another result than broadcasting gives
