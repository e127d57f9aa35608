from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_tp.infer.calls.local_sizes import PerRankInt
from lightning_tp.infer.calls.recorded_call import NotOnShards
from lightning_tp.infer.calls.sizes import full_sizes, getitem, resize, split
from tests.infer.calls.recorded import halves, recorded, sharded

X = torch.arange(48.0).view(2, 3, 8)
EACH = (1, 2)  # a factor of one half


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
