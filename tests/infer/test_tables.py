"""Embeddings of subclasses: which may be looked up in shards of their rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tp.infer.tables import needs_full_table


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3


class Normed(nn.Embedding):
    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.norm = nn.LayerNorm(sizes[1])

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(super().forward(ids)) * ids.sign().unsqueeze(-1)


class ByFunction(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class Tinted(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + self.weight.mean()


class OfTwo(nn.Embedding):
    def forward(self, ids: Tensor, other: Tensor) -> Tensor:
        return super().forward(ids + other)


@pytest.mark.parametrize(
    ("cls", "needs"), [(nn.Embedding, False), (Scaled, False), (Normed, False), (ByFunction, True), (Tinted, True), (OfTwo, True)]
)
def test_code_that_looks_rows_up_by_the_class_below_may_have_shards(cls: type[nn.Embedding], needs: bool) -> None:
    module = cls(101, 8)
    before = module.weight.clone()
    assert needs_full_table(module, 2) is needs_full_table(module, 4) is needs
    assert type(module) is cls and torch.equal(module.weight, before)


def test_more_ranks_than_rows_and_weights_on_the_meta_device() -> None:
    assert not needs_full_table(Scaled(3, 8), 4)
    assert not needs_full_table(Normed(50, 8, device="meta"), 2)
    assert needs_full_table(ByFunction(50, 8, device="meta"), 2)
