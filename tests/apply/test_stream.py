"""Blocks of a sequence-parallel stream may be left out, repeated, called by themselves, or read from in between."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import lightning_tp as ltp
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.core.ops.stream_shard import StreamShard
from lightning_tp.testing import run_ranks


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(3)), nn.Linear(16, 16)

    def forward(self, x: Tensor, order: Any = (0, 1, 2), read: Any = None) -> Tensor:
        kept = []
        for i in order:
            x = self.blocks[i](x)
            kept.append(x)
        y = self.head(x)
        return y if read is None else y + kept[read].mean(1, keepdim=True).tanh()


def orders() -> None:
    torch.manual_seed(0)
    one, x = Stack(), torch.randn(2, 7, 16)
    plan = ltp.infer_plan(one, (x,), tp=2)
    assert plan.sequence_parallel
    many: Any = ltp.parallelize(copy.deepcopy(one), make_mesh("cpu", 1, 2), plan)
    many._ways = None  # no unsplit run helps
    assert isinstance(many.blocks[0](x), StreamShard)
    for order in ((0, 1, 2), (0, 1), (1, 2), (1,), (0, 2), (0, 1, 1, 2), (2, 0, 1)):
        for read in (None, 0, len(order) - 1):
            one.zero_grad(), many.zero_grad()
            wanted, got = one(x, order, read), many(x, order, read)
            torch.testing.assert_close(got, wanted)
            wanted.square().sum().backward()
            got.square().sum().backward()
            found = ltp.full_gradients(many)
            for name, p in one.named_parameters():
                if p.grad is not None:
                    torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-5)


def test_blocks_in_any_order() -> None:
    run_ranks(orders, 2)
