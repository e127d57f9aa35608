"""Collectives of plain tensors, against shards cut by hand."""

from __future__ import annotations

import itertools

import torch

from lightning_tp.core.comm import collectives
from lightning_tp.core.comm.collectives import all_gather, all_reduce, reduce_scatter
from lightning_tp.testing import run_ranks
from tests.core.comm.test_transitions import axis_of, integers
from tests.harness import shard_of


def test_plain_collectives() -> None:
    def body() -> None:
        axis = axis_of()
        rank, tp = axis.rank, axis.size
        x = torch.full((2, 3), float(rank))
        assert all_reduce(x, axis) is x and torch.equal(x, torch.full((2, 3), 6.0))
        for dim, shape in itertools.product((0, 1, 2), ((5, 6, 7), (1, 6, 9), (4, 1, 8))):
            whole = integers(*shape, seed=3)
            shard = shard_of(whole, dim, rank, tp, padding=0.0)
            assert torch.equal(collectives.shard_of(whole, dim, axis), shard), (dim, shape)
            assert torch.equal(all_gather(shard, dim, shape[dim], axis), whole), (dim, shape)
            assert torch.equal(reduce_scatter(whole, dim, axis), shard * tp), (dim, shape)
        held_bytes = collectives.shard_of(torch.zeros(1, 64, 64), 1, axis).untyped_storage().nbytes()
        assert held_bytes == 16 * 64 * 4  # a view would keep the whole alive

    run_ranks(body, 4)
