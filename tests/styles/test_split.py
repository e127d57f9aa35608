"""How a parameter is cut: shards that are taken and put back, heads, ranges that ranks share."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import lightning_tp as ltp
from lightning_tp.core.comm.state import S
from lightning_tp.styles import (
    Split,
)
from lightning_tp.styles.split import Ownership, check_heads, even_split, head_split


def put_together(split: Split, whole: Tensor, tp: int) -> Tensor:
    again = torch.full_like(whole, torch.nan)
    for rank in range(tp):
        split.put(again, split.take(whole, rank), rank)
    return again


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_split_is_taken_and_put_back(tp: int, dim: int) -> None:
    shape = (24, 5) if dim == 0 else (5, 24)
    whole = torch.arange(120.0).view(shape)
    splits = [even_split(24, dim, tp), Split()]
    splits += [head_split(24, dim, tp, heads) for heads in (1, 2, 3, 4, 6, 8, 12, 24) if heads % tp == 0 or tp % heads == 0]
    for split in splits:
        assert torch.equal(put_together(split, whole, tp), whole), split
        for rank in range(tp):
            local = split.take(whole, rank)
            assert tuple(local.shape) == split.local_shape(whole.shape, rank)
            assert local.is_contiguous() and local.untyped_storage().nbytes() == local.numel() * 4  # a tensor of its own
        held = sum(split.local_shape(shape, rank)[dim] for rank in range(tp))
        assert held == 24 * (tp if split.dim is None else split.sum_over(tp))  # shared heads are held that often


def test_a_split_of_several_ranges_keeps_their_order() -> None:
    split = Split(S(0), (((0, 2), (6, 7)), ((2, 6), (7, 9))))
    whole = torch.arange(9.0)
    assert split.take(whole, 0).tolist() == [0, 1, 6] and split.take(whole, 1).tolist() == [2, 3, 4, 5, 7, 8]
    assert torch.equal(put_together(split, whole, 2), whole)
    assert (split.length(0), split.length(1)) == (3, 6)
    assert split.local_shape((9, 4), 1) == (6, 4)


def test_heads_by_hand() -> None:
    assert head_split(24, 0, 2, 6).ranges == (((0, 12),), ((12, 24),))
    assert head_split(24, 0, 2, 6, offset=100).ranges == (((100, 112),), ((112, 124),))
    assert head_split(8, 0, 8, 2).ranges == (((0, 4),),) * 4 + (((4, 8),),) * 4
    assert [head_split(8, 0, 8, heads).sum_over(8) for heads in (1, 2, 4, 8)] == [8, 4, 2, 1]
    assert head_split(8, 0, 2, 4).sum_over(2) == 1


def test_which_splits_torch_has_a_word_for() -> None:
    for length, tp in itertools.product((1, 5, 8, 341), (1, 2, 3, 4)):
        assert even_split(length, 0, tp).is_even_chunks
    assert Split().is_even_chunks and head_split(24, 0, 4, 8).is_even_chunks
    assert not head_split(24, 0, 4, 2).is_even_chunks
    assert not Split(S(0), (((0, 2), (4, 6)), ((2, 4), (6, 8)))).is_even_chunks
    assert not Split(S(0), (((4, 8),), ((0, 4),))).is_even_chunks


def test_every_size_of_tp_that_is_named_works_and_no_other() -> None:
    for heads, kv_heads in ((12, 12), (12, 4), (12, 3), (12, 1), (6, 2), (7, 7), (7, 1)):
        with pytest.raises(ltp.TPError) as error:
            check_heads("k", kv_heads, heads, 24 * kv_heads, 1000)
        named = {int(n) for n in str(error.value).partition("Use tp=")[2].partition(", or")[0].split(", ")}
        for tp in range(1, 30):
            if tp in named:
                check_heads("k", kv_heads, heads, 24 * kv_heads, tp)
                split = head_split(24 * kv_heads, 0, tp, kv_heads)
                # every rank's queries read the key/value heads that this rank has
                for rank in range(tp):
                    queries = range(rank * heads // tp, (rank + 1) * heads // tp)
                    ((start, stop),) = split.ranges[rank]
                    assert {q * kv_heads // heads for q in queries} <= set(range(start // 24, stop // 24)), (heads, kv_heads, tp)
            else:
                with pytest.raises(ltp.TPError, match=f"tp={tp}"):
                    check_heads("k", kv_heads, heads, 24 * kv_heads, tp)


def test_an_ownership_is_the_shortest_that_is_repeated() -> None:
    ownership = Ownership.of(torch.tensor([0, 0, 1, 1] * 3))
    assert ownership == Ownership(((0, 2), (1, 2)))
    assert (ownership.period, ownership.local(12, 0), ownership.index(1, 8).tolist()) == (4, 6, [2, 3, 6, 7])


def test_what_every_rank_has_counts_for_each() -> None:
    ownership = Ownership(((0, 2), (1, 2), (-1, 3)))
    assert ownership.ranges(0) == ((0, 2), (4, 7))
    assert ownership.ranges(1) == ((2, 7),)
    assert ownership.count(1) == 5
