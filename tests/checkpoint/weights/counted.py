"""Stored tensors that count how many bytes of them are in memory at once."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_tp.checkpoint.weights import safetensors_file
from lightning_tp.checkpoint.weights.stored import StoredTensor


@contextmanager
def bytes_read() -> Iterator[list[int]]:
    """How many bytes each read of files of safetensors that are opened in here takes."""
    counts: list[int] = []
    own = safetensors_file._stored

    def counted(*args: Any) -> StoredTensor:
        stored = own(*args)

        def load(box: Any, dtype: torch.dtype) -> Tensor:
            counts.append(box.numel * stored.dtype.itemsize)
            return stored.load(box, dtype)

        return replace(stored, load=load)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_file, "_stored", counted)
        yield counts


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
