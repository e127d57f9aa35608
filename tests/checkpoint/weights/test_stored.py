"""Stored tensors: what is asked of them without reading, and what reading gives."""

from __future__ import annotations

import torch

from lightning_tp.checkpoint.weights.stored import StoredTensor, in_memory, unique
from lightning_tp.core.boxes import Box


def test_a_tensor_in_memory_as_a_stored_one() -> None:
    t = torch.arange(12.0).view(3, 4)
    stored = in_memory(t.t())
    assert (stored.shape, stored.dtype, stored.numel, stored.nbytes) == ((4, 3), torch.float32, 12, 48)
    assert torch.equal(stored.read(), t.t()) and stored.read().is_contiguous()
    assert torch.equal(stored.read(Box((1, 0), (2, 3))), t.t()[1:3])
    assert stored.cast(torch.float64).read().dtype == torch.float64
    assert not in_memory(torch.ones(2, requires_grad=True)).read().requires_grad


def test_only_floating_point_numbers_are_cast() -> None:
    """What is cast is read in that dtype; its bytes are counted in it."""
    floats, ints = in_memory(torch.ones(4)), in_memory(torch.ones(4, dtype=torch.int64))
    half = floats.cast(torch.bfloat16)
    assert half.read().dtype == torch.bfloat16 and half.nbytes == 8 and half.key == floats.key
    assert ints.cast(torch.bfloat16) is ints and floats.cast(None) is floats and floats.cast(torch.float32) is floats


def test_tied_tensors_are_counted_once() -> None:
    t = torch.ones(4)
    tensors = {"a": in_memory(t), "b": in_memory(t), "part": in_memory(t[:2]), "c": in_memory(torch.ones(4))}
    tensors |= {n: StoredTensor((0,), torch.float32, lambda box, dtype: torch.empty(0)) for n in ("none", "nothing")}
    assert list(unique(tensors)) == ["a", "part", "c", "none", "nothing"]
    assert in_memory(torch.empty(0)).key is None
