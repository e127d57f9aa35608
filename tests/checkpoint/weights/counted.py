"""Stored tensors that count how many bytes of them are in memory at once."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from lightning_tp.checkpoint.weights.stored import StoredTensor


class CountedReads:
    """`number` tensors of 4000 bytes; `peak` is the most that was alive of them at once, whoever held the memory."""

    def __init__(self, number: int) -> None:
        self.alive = self.peak = 0
        self.tensors = {f"w{i}": StoredTensor((1000,), torch.float32, self._load) for i in range(number)}

    def _load(self, box: Any, dtype: torch.dtype) -> Tensor:
        t = torch.ones(1000)
        self.alive += t.nbytes
        self.peak = max(self.peak, self.alive)
        weakref.finalize(t.untyped_storage(), self._freed, t.nbytes)
        return t

    def _freed(self, nbytes: int) -> None:
        self.alive -= nbytes
