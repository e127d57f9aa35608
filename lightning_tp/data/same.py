"""Ranks of one tensor-parallel group have to work on the same batch: compare it, cheaply."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

from lightning_tp.errors import TPError


def check_same_batch(batch: Any, group: dist.ProcessGroup, device: torch.device, where: str) -> None:
    """Compare a batch over the ranks of `group`: shapes, dtypes and an exact sum over the bytes of each tensor. A collective.

    Args:
        batch: any nesting of tensors; what is no tensor is not looked at.
        group: the ranks that have to have the same.
        device: where the collective runs.
        where: which batch it is, for the error.

    Raises:
        TPError: on every rank of the group, if they differ.
    """
    leaves, _ = tree_flatten_with_path(batch)
    named = [("".join(map(str, path)) or "batch", t) for path, t in leaves if isinstance(t, Tensor)]
    mine = torch.tensor([_digest(t) for _, t in named], dtype=torch.int64, device=device).view(len(named), 3)
    count = torch.tensor([len(named)], dtype=torch.int64, device=device)
    counts = [torch.zeros_like(count) for _ in range(group.size())]
    dist.all_gather(counts, count, group=group)
    if len({int(c) for c in counts}) > 1:
        raise TPError(
            f"{where}: the ranks of one tensor-parallel group have {[int(c) for c in counts]} tensors in their batch. {_REMEDY}"
        )
    if not named:
        return
    every = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(every, mine, group=group)
    for i, (name, t) in enumerate(named):
        differ = [r for r, other in enumerate(every) if not torch.equal(other[i], every[0][i])]
        if differ:
            what = "shape" if any(int(every[r][i, 0]) != int(every[0][i, 0]) for r in differ) else "values"
            raise TPError(
                f"{where}: `{name}` {tuple(t.shape)} differs inside a tensor-parallel group: ranks {differ} of {group.size()} have other "
                f"{what} than rank 0. {_REMEDY}"
            )


_REMEDY = (
    "All ranks of a group work on one batch. Let the dataset give the same item for the same index on every rank (seed it by the index), "
    "shuffle with a seeded sampler, and let an iterable dataset be split by the data-parallel rank, not the global one."
)


def _digest(t: Tensor) -> tuple[int, int, int]:
    """(shape and dtype, sum of all bytes, sum of the first half's): the last tells another order."""
    t = t.detach()
    raw = (t.to(torch.uint8) if t.dtype == torch.bool else t).contiguous().reshape(-1)
    raw = raw.view(torch.uint8) if raw.numel() else raw.to(torch.uint8)
    shape = zlib.crc32(f"{tuple(t.shape)} {t.dtype}".encode())
    return shape, int(raw.sum(dtype=torch.int64)), int(raw[: raw.numel() // 2].sum(dtype=torch.int64))
