"""A shard of a stream shows the full shape, stays a shard under pointwise functions, and is all-gathered for anything else."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.collectives import shard_of
from lightning_tp.core.ops.stream_shard import StreamShard, plain_shard, stream_shard
from lightning_tp.testing import run_ranks


def views() -> None:
    rank = torch.distributed.get_rank()
    axis = Axis(torch.distributed.group.WORLD)  # type: ignore[arg-type]
    full = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    leaf: Tensor = shard_of(full, 1, axis).clone().requires_grad_()
    x = stream_shard(leaf * 1, axis, 5)
    assert x.shape == (2, 5, 4) and x.numel() == 40 and len(x) == 2 and x.dtype == torch.float32
    assert plain_shard(x).shape == (2, 3, 4) and type(plain_shard(x)) is Tensor
    y = (x * 2 + x).float()
    assert type(y) is StreamShard
    torch.testing.assert_close(y + torch.ones(1, 5, 1), full * 3 + 1)
    axis.seq_len = 6  # another sequence has come since
    torch.testing.assert_close(x.mean(1), full.mean(1))
    assert x.full_tensor() is x.full_tensor()
    (x.square().sum() + y[:, -1].sum()).backward()
    wanted = 2 * full
    wanted[:, -1] += 3
    torch.testing.assert_close(leaf.grad[:, : 2 + (rank == 0)], shard_of(wanted, 1, axis)[:, : 2 + (rank == 0)])  # type: ignore[index]
    with torch.no_grad():
        z = stream_shard(shard_of(full, 1, axis).clone(), axis, 5)
        z[:, 0] = 7.0
        z.mul_(2)
        torch.testing.assert_close(z.full_tensor()[:, 0], torch.full((2, 4), 14.0))
        torch.testing.assert_close(z.full_tensor()[:, 1:], 2 * full[:, 1:])


def test_views_of_a_shard() -> None:
    run_ranks(views, 2)
