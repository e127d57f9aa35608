from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_tp.infer.calls.changes import (
    RULES,
    change_of,
    combine,
    convolve,
    einsum,
    full_sizes,
    getitem,
    move_along_one_dim,
    resize,
    split,
)
from lightning_tp.infer.calls.local_sizes import PerRankInt
from lightning_tp.infer.calls.recorded_call import Change, NotOnShards, RecordedCall
from lightning_tp.styles.calls.call import Operand
from tests.infer.calls.recorded import LayoutsOf, halves, recorded, sharded

X, ROW = torch.arange(48.0).view(2, 3, 8), torch.arange(8.0)
MATRIX, WEIGHT = torch.randn(3, 8), torch.randn(8, 8)
OWNED = halves(2).ownership
EACH = (1, 2)  # a factor of one half


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


def size(whole: int, *local: int) -> Any:
    return PerRankInt.of(whole, local)


def test_a_hard_coded_size_is_multiplied() -> None:
    call = recorded(Tensor.view, X, 2, 3, 4, 2, layouts={0: halves(2)}, results=sharded(2, (0, 2), (1, 2)))
    assert resize(call).call.sizes == (((2, *EACH),),) * 2
    packed = recorded(Tensor.reshape, X, (2, 3, 4, 2), layouts={0: halves(2)}, results=sharded(2, (0, 2), (1, 2)))
    assert resize(packed).call.sizes == (((2, *EACH),),) * 2
    uneven = recorded(Tensor.view, X, 2, 3, 8, layouts={0: sharded(2, (0, 3), (1, 5))}, results=sharded(2, (0, 3), (1, 5)))
    assert resize(uneven).call.sizes == (((2, 3, 8),), ((2, 5, 8),))


def test_a_size_that_was_read_from_a_shard_is_right() -> None:
    heads = size(4, 2, 2)
    call = recorded(Tensor.view, X, 2, -1, heads, 2, layouts={0: halves(2)}, results=sharded(2, (0, 2), (1, 2)))
    change = resize(call)
    assert not change.call.changes and change.sizes == (heads,)


def test_a_size_that_was_read_from_a_shard_and_is_wrong_is_not_known() -> None:
    wrong = size(8, 2, 2)
    change = resize(recorded(Tensor.view, X, 6, wrong, layouts={0: halves(2)}, results=halves(1)))
    assert change.call.sizes == (((1, 2, 1),),) * 2 and change.sizes == ()
    none = size(8, 0, 8)
    change = resize(recorded(Tensor.view, X, 6, none, layouts={0: halves(2)}, results=halves(1)))
    assert change.call.sizes == (((1, 4, 0),), ((1, *EACH),))


def test_calls_with_sizes_in_other_places() -> None:
    call = recorded(Tensor.unflatten, X, -1, (4, 2), layouts={0: halves(2)}, results=sharded(2, (0, 2), (1, 2)))
    assert resize(call).call.sizes == (((0, *EACH),),) * 2
    call = recorded(Tensor.repeat, X, 1, 1, 2, layouts={0: halves(2)}, results=halves(2))
    assert not resize(call).call.changes  # twice as many of each rank's
    call = recorded(Tensor.expand, X[:1, :1, :1], 2, 3, 8, results=halves(2))
    assert resize(call).call.sizes == (((2, *EACH),),) * 2
    call = recorded(Tensor.view, X, torch.int32, layouts={0: halves(2)}, results=halves(2))
    assert not resize(call).call.changes


def test_sizes_by_keyword_can_not_be_changed() -> None:
    call = recorded(torch.reshape, X, kwargs={"shape": (6, 8)}, layouts={0: halves(2)}, results=halves(1))
    with pytest.raises(NotOnShards, match="keyword"):
        resize(call)
    assert not resize(recorded(torch.reshape, X, kwargs={"shape": (6, 8)})).call.changes


def test_what_every_rank_has_is_made_with_full_sizes() -> None:
    n = size(8, 4, 4)
    change = full_sizes(recorded(torch.zeros, 2, n))
    assert change is not None and change.call.sizes == (((1, 2, 1),),) * 2 and change.sizes == (n,)
    assert full_sizes(recorded(Tensor.new_ones, X, (2, 3))).call.sizes == ()  # type: ignore[union-attr]
    assert full_sizes(recorded(torch.full, (2, n), 1.0)) is None


@pytest.mark.parametrize("by", ["position", "keyword", "negative"])
def test_pieces_of_the_split_dim_are_those_of_each_rank(by: str) -> None:
    """A fused weight of 4 and 4, each of which is split."""
    layout, piece = sharded(2, (0, 2), (1, 2), (0, 2), (1, 2)), halves(2, 4)
    dims: dict[str, Any] = {"position": ((2,), {}), "keyword": ((), {"dim": 2}), "negative": ((-1,), {})}
    args, kwargs = dims[by]
    call = recorded(torch.split, X, 4, *args, kwargs=kwargs, layouts={0: layout}, results=piece)
    assert split(call).call.pieces == ((2, 2), (2, 2))


def test_pieces_that_are_right_on_shards_are_not_changed() -> None:
    layout, piece = sharded(2, (0, 2), (1, 2), (0, 2), (1, 2)), halves(2, 4)
    assert not split(recorded(torch.chunk, X, 2, 2, layouts={0: layout}, results=piece)).call.changes
    width = size(4, 2, 2)
    change = split(recorded(torch.split, X, width, 2, layouts={0: layout}, results=piece))
    assert not change.call.changes and change.sizes == (width,)
    listed = split(recorded(torch.split, X, [width, 4], 2, layouts={0: layout}, results=piece))
    assert listed.call.pieces == ((2, 2), (2, 2)) and listed.sizes == (width,)
    assert not split(recorded(torch.split, X, 1, 0, layouts={0: layout}, results=layout)).call.changes  # another dim
    assert split(recorded(torch.tensor_split, X, 2, 2, layouts={0: layout}, results=piece)).call.pieces == ((2, 2), (2, 2))


def test_a_slice_of_the_split_dim_has_the_bounds_of_each_rank() -> None:
    """The first half of (2 of rank 0, 2 of rank 1), twice."""
    layout = sharded(2, (0, 2), (1, 2), (0, 2), (1, 2))
    call = recorded(Tensor.__getitem__, X, (..., slice(0, 4)), layouts={0: layout}, results=halves(2, 4))
    assert getitem(call).call.items == ((1, 0, 2, 1, 4), (1, 0, 2, 1, 4))
    call = recorded(Tensor.__getitem__, X, (slice(None), slice(None), slice(6, None)), layouts={0: layout}, results=None)
    assert getitem(call).call.items == ((2, 0, 0, 1, 4), (2, 2, 4, 1, 4))


def test_slices_that_are_right_on_shards_are_not_changed() -> None:
    half = size(4, 2, 2)
    layout = sharded(2, (0, 2), (1, 2), (0, 2), (1, 2))
    change = getitem(recorded(Tensor.__getitem__, X, (..., slice(half, None)), layouts={0: layout}, results=halves(2, 4)))
    assert not change.call.changes and change.sizes == (half,)
    for index in (0, (slice(0, 1), ...), (None, 1)):
        assert not getitem(recorded(Tensor.__getitem__, X, index, layouts={0: layout}, results=layout)).call.changes
    assert not getitem(recorded(Tensor.__getitem__, X, 0)).call.changes
    every_other = recorded(Tensor.__getitem__, X, (..., slice(None, None, 2)), layouts={0: halves(2)}, results=halves(2, 4))
    assert not getitem(every_other).call.changes


def test_other_indices_of_the_split_dim_can_not_be_taken_on_shards() -> None:
    with pytest.raises(NotOnShards, match="an index into"):
        getitem(recorded(Tensor.__getitem__, X, (..., 3), layouts={0: halves(2)}))
    length, apart = size(8, 4, 4), sharded(2, (0, 1), (1, 1), (0, 2), (1, 2), (0, 1), (1, 1))
    with pytest.raises(NotOnShards, match="not a slice of each shard") as raised:  # of those of rank 0 the 1st, 2nd and 4th
        getitem(recorded(Tensor.__getitem__, X, (..., slice(0, length, 2)), layouts={0: apart}))
    assert raised.value.sizes == (length,)


def changed(call: RecordedCall) -> Change:
    layouts: Any = LayoutsOf(call)
    return change_of(call, layouts, set())


def test_rules_are_looked_up_by_name() -> None:
    assert {RULES[name].__name__ for name in ("view", "reshape", "expand")} == {"resize"}
    assert [RULES[n].__name__ for n in ("chunk", "__getitem__", "einsum", "conv2d")] == ["split", "getitem", "einsum", "convolve"]


def test_a_change_is_tried() -> None:
    assert changed(recorded(torch.mul, MATRIX, ROW, layouts={0: halves(1)}, results=halves(1))).call.operands
    with pytest.raises(NotOnShards, match="another one"):
        changed(recorded(torch.cumsum, MATRIX, 1, layouts={0: halves(1)}, results=halves(1)))


def test_random_numbers_are_not_compared() -> None:
    assert not changed(recorded(F.dropout, MATRIX, 0.5, layouts={0: halves(1)}, results=halves(1))).call.changes


def test_a_product_with_a_row_wise_weight_leaves_partial_sums() -> None:
    call = recorded(F.linear, MATRIX, WEIGHT, layouts={0: halves(1)}, split=(1,), products=(("in", "w"),))
    change = changed(call).call
    assert change.leave and not change.operands and change.logits is None


def test_logits_stay_split_and_their_input_has_a_partial_gradient() -> None:
    call = recorded(F.linear, MATRIX, WEIGHT, split=(1,), products=(("out", "w"),), vocabulary=8)
    change = changed(call).call
    assert change.logits == 8 and change.operands == (Operand((0,), None, enter=True),) and not change.leave


def test_what_can_not_run_on_shards_says_why_and_whose_features_it_needs() -> None:
    two = recorded(torch.mul, MATRIX, ROW, layouts={0: halves(1)}, products=(("out", "w"), ("in", "v")))
    with pytest.raises(NotOnShards, match="several products"):
        changed(two)
    with pytest.raises(NotOnShards, match="split along 2 dims") as raised:
        changed(recorded(torch.mul, MATRIX, WEIGHT[:3], layouts={0: halves(1), 1: "split along 2 dims"}, results=halves(1)))
    (tensor,) = raised.value.tensors or []
    assert tensor.shape == (3, 8) and tensor is not MATRIX


def test_numbers_that_are_known_for_sizes_stay_known_where_the_trial_fails() -> None:
    n = PerRankInt.of(8, (4, 4))
    call = recorded(Tensor.view, MATRIX, 3, n, layouts={0: halves(1)}, results=sharded(1, (0, 2), (1, 2)))  # of the right size
    with pytest.raises(NotOnShards, match="another one") as raised:
        changed(call)
    assert raised.value.sizes == (n,)


@pytest.mark.parametrize(("args", "moves"), [((0, 0), False), ((1, 0), True), ((-1, 0), True)])
def test_a_move_along_the_split_dim_is_another_one_on_shards(args: Any, moves: bool) -> None:
    call = recorded(torch.select, MATRIX, *args, layouts={0: halves(1)}, results=None if moves else halves(0))
    if moves:
        with pytest.raises(NotOnShards, match="along the split dimension"):
            move_along_one_dim(call)
    else:
        assert not move_along_one_dim(call).call.changes
    assert not move_along_one_dim(recorded(torch.movedim, MATRIX, 1, 0, layouts={0: halves(1)}, results=halves(0))).call.changes
