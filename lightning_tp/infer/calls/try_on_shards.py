"""Run one recorded call on shards and compare it with its result on whole tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_tp.infer.calls.local_sizes import PerRankInt, mapped

MOST_TRIED = 2**22  # elements of what a call is given and returns, above which it is not tried on shards


MOST_CUT = 3  # operands of one call that may turn out to be whole on each rank, although a size of theirs is that of the split dim


def _number(x: Any) -> Any:
    """What a call is given beside tensors, to compare."""
    return None if isinstance(x, Tensor) else (x.whole, *x.local) if isinstance(x, PerRankInt) else x


def _swapped(x: Any, tensors: dict[int, Tensor]) -> Any:
    """With other tensors in place of these."""
    return mapped(x, lambda t: tensors.get(id(t), t) if isinstance(t, Tensor) else t)


def _shard(t: Tensor, layout: Any, rank: int) -> Tensor:
    return t if layout is None else t.index_select(layout[0], layout[1].index(rank, t.shape[layout[0]]))


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.detach(), b.detach()
    if torch.equal(a, b):  # most are, bit by bit
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return False
    finite = b.isfinite()
    scale = float(b[finite].abs().max()) if bool(finite.any()) else 0.0
    tolerance = 0.05 if a.dtype in (torch.bfloat16, torch.float16) else 1e-3
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
