"""Exact checksums of tensors, to tell whether ranks hold the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_bytes(t: Tensor) -> Tensor:
    """Return the elements of a tensor, in order, as a flat tensor of uint8.

    Example:
        >>> as_bytes(torch.tensor([1, 256], dtype=torch.int16)).tolist()
        [1, 0, 0, 1]
    """
    flat = t.detach().reshape(-1)
    flat = flat.to(torch.uint8) if flat.dtype == torch.bool or not flat.numel() else flat.contiguous()
    return flat.view(torch.uint8)


def byte_sums(t: Tensor) -> Tensor:
    """Return (2,) of int64 on the tensor's device: the sum of all bytes, and that of the first half of them, which tells their order.

    Example:
        >>> byte_sums(torch.tensor([1, 2, 3, 4], dtype=torch.uint8)).tolist()
        [10, 3]
    """
    raw = as_bytes(t)
    return torch.stack((raw.sum(dtype=torch.int64), raw[: raw.numel() // 2].sum(dtype=torch.int64)))


def bit_sum(t: Tensor) -> Tensor:
    """Return () of int64 on the tensor's device: the sum of the elements' bits, read as integers of their width. One pass, for large tensors.

    Example:
        >>> int(bit_sum(torch.tensor([1.0, 0.0]))) == 0x3F800000
        True
    """
    real = torch.view_as_real(t.detach()) if t.is_complex() else t.detach()
    return real.contiguous().view(_INTEGERS[real.element_size()]).sum(dtype=torch.int64)
