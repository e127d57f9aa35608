"""A tensor that is stored in a checkpoint: shape, dtype, and how any slice of it is read; and the checkpoint that has it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tp.core.boxes import Box, full_box, narrow


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk, of which nothing is read yet."""

    shape: tuple[int, ...]  # of the full tensor
    dtype: torch.dtype  # of the full tensor
    # reads a box of it, as a contiguous tensor on the CPU in the dtype that it is told
    load: Callable[[Box, torch.dtype], Tensor] = field(repr=False, compare=False)
    # tensors with the same key share their memory (tied weights); None: it shares it with none
    key: Any = field(default=None, repr=False)

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.numel * self.dtype.itemsize

    def read(self, box: Box | None = None) -> Tensor:
        """Read all of it or a box, with one copy in memory, and a part more while it is read. Don't write into the result."""
        return self.load(full_box(self.shape) if box is None else box, self.dtype)

    def cast(self, dtype: torch.dtype | None) -> StoredTensor:
        """Return the same in another dtype if it has floating-point numbers."""
        if dtype is None or not self.dtype.is_floating_point or dtype == self.dtype:
            return self
        return StoredTensor(self.shape, dtype, self.load, self.key)


def in_memory(t: Tensor) -> StoredTensor:
    """Return a tensor that is in memory, or mapped from a file, as a stored one."""
    t = t.detach()
    storage = t.untyped_storage()
    key = (storage.data_ptr(), t.storage_offset(), tuple(t.shape), t.stride(), t.dtype) if storage.nbytes() else None
    return StoredTensor(tuple(t.shape), t.dtype, lambda box, dtype: narrow(t, box).to("cpu", dtype).contiguous(), key)


@dataclass
class StoredCheckpoint:
    """What is in a checkpoint; its tensors are read when they are asked for."""

    kind: str  # "folder", "file" or "safetensors"
    path: Path  # where it is
    model: dict[str, StoredTensor]  # the model's tensors by their names in its state dict
    # for each one {"state": {name or number: {field: StoredTensor or a value}}, "param_groups": [..]}
    optimizers: list[dict[str, Any]] = field(default_factory=list)
    # everything else (epoch, step, loops, callbacks, hyperparameters, ..), with `StoredTensor` in place of tensors
    rest: dict[str, Any] = field(default_factory=dict)
    by: str = ""  # who wrote it, as far as that can be seen


def unique(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Leave out the later names of tied tensors."""
    first: dict[Any, str] = {}
    for name, stored in tensors.items():
        first.setdefault((stored.key,) if stored.key is not None else name, name)
    return {name: tensors[name] for name in first.values()}
