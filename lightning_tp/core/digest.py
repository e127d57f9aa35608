"""Digests: one number for a tensor or another value, to compare it between ranks without sending it."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

CHUNK = 2**20  # words of 8 bytes that are read at once


def digest(t: Tensor) -> Tensor:
    """Return a digest of a tensor's bytes in their order: () of int64 on its device. Shape and dtype are not in it.

    A sum of the words of 8 bytes, each times an odd number of its own: a word that changes always changes it, words that change places hardly
    ever leave it as it was.

    Example:
        >>> t = torch.tensor([1.0, 2.0, 2.0, 1.0, 3.0])
        >>> bool(digest(t) == digest(t.clone())), bool(digest(t) == digest(t.flip(0)))
        (True, False)
    """
    raw = as_bytes(t.detach().reshape(-1))
    whole = raw.numel() // 8 * 8
    words = raw[:whole] if raw.data_ptr() % 8 == 0 else raw[:whole].clone()
    rest = torch.zeros(8, dtype=torch.uint8, device=raw.device)
    rest[: raw.numel() - whole] = raw[whole:]
    factors = torch.arange(min(CHUNK, whole // 8), device=raw.device) * 0x1E3779B97F4A7C15  # int64 wraps around
    factors = ((factors ^ (factors >> 29)) * 0x3F58476D1CE4E5B9) | 1
    total = rest.view(torch.int64).sum()
    for piece in words.view(torch.int64).split(CHUNK):
        piece = piece ^ (piece >> 32)  # the low bits of most float64 are zeros, and a product keeps them so
        total = total * 0x14D049BB133111EB + (piece * factors[: piece.numel()]).sum()
    return total


def as_bytes(flat: Tensor) -> Tensor:
    """Return the bytes of a tensor of one dim, as uint8; a view of it where it is contiguous."""
    flat = flat.to(torch.uint8) if flat.dtype == torch.bool else flat.contiguous()
    return flat.view(torch.uint8) if flat.numel() else flat.to(torch.uint8)


def value_digest(value: Any) -> int:
    """Return a number below 2**32 for a value that is no tensor: text, a number, a NumPy array; of other objects only the class counts.

    Example:
        >>> value_digest("a b") == value_digest("a b") != value_digest("b a")
        True
    """
    if isinstance(value, (str, int, float, complex, type(None))):
        text = f"{type(value).__name__} {value!r}".encode()
    elif isinstance(value, (bytes, bytearray)):
        text = bytes(value)
    elif isinstance(value, (set, frozenset)):
        text = repr(sorted(map(value_digest, value))).encode()
    elif hasattr(value, "dtype") and hasattr(value, "tobytes"):
        text = f"{value.dtype} {getattr(value, 'shape', ())}".encode() + (b"" if value.dtype == object else value.tobytes())
    else:
        text = type(value).__qualname__.encode()
    return zlib.crc32(text)
