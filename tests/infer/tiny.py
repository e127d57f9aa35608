"""A model with one layer of each kind that a plan may have: an MLP of odd width, fused attention of two heads, logits. No tests here."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_tp.infer.assign import Assignment, assign
from lightning_tp.infer.blocks.workload import Workload


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(4, 9), nn.Linear(9, 4), nn.Linear(4, 300)
        self.qkv, self.o = nn.Linear(4, 3 * 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(self.up(x).relu())
        q, k, v = self.qkv(x).view(2, 3, 3, 2, 2).permute(2, 0, 3, 1, 4)
        x = x + self.o((q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).reshape(2, 3, 4))
        return self.head(x)


def workload(model: nn.Module | None = None, tp: int = 2) -> Workload:
    return Workload(model or Tiny(), lambda m, x: m(x), torch.zeros(2, 3, 4), tp)


def assigned(work: Workload) -> Assignment:
    parameters = dict(work.model.named_parameters())
    return assign(work, work.trace(set(), {}), frozenset(), {}, parameters)
