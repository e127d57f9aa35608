"""Compare batches between the ranks of a tensor-parallel group, which all have to work on the same one."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_tp._compat import gather_rows
from lightning_tp.core.trees import named_tensors_in, tensors_in
from lightning_tp.errors import TPError

SAMPLE = 4096  # elements of a tensor that a quick fingerprint reads

_REMEDY = (
    "All ranks of a group have to work on the same batch. Loaders give them the same one, so look at what changes it afterwards: let "
    "`on_before_batch_transfer`, `on_after_batch_transfer` and the like do the same on every rank, with seeded random numbers."
)


def check_same_batch(batch: Any, group: dist.ProcessGroup, device: torch.device, where: str) -> None:
    """Compare the tensors of a batch over the ranks of a group: shapes, dtypes, exact sums over their bytes. A collective on `device`.

    `TPError`, which calls the batch `where`, on every rank of the group if they differ.
    """
    named = [(name or "batch", t) for name, t in named_tensors_in(batch)]
    mine = torch.tensor([_digest(t) for _, t in named], dtype=torch.int64, device=device).view(len(named), 3)
    counts = gather_rows(torch.tensor([len(named)], device=device), group).flatten().tolist()
    if len(set(counts)) > 1:
        raise TPError(f"{where}: the ranks of one tensor-parallel group have {counts} tensors in their batches. {_REMEDY}")
    if not named:
        return
    digests = gather_rows(mine, group)  # (ranks, tensors, 3)
    for i, (name, t) in enumerate(named):
        differ = [rank for rank, digest in enumerate(digests) if not torch.equal(digest[i], digests[0][i])]
        if differ:
            what = "shape or dtype" if any(int(digests[rank][i, 0]) != int(digests[0][i, 0]) for rank in differ) else "values"
            raise TPError(
                f"{where}: `{name}` {tuple(t.shape)} differs inside a tensor-parallel group: the {what} on ranks {differ} of "
                f"{group.size()} differ from those on rank 0. {_REMEDY}"
            )


def fingerprint(batch: Any, *, whole: bool = False) -> int:
    """Return a number below 2**32 that is the same for equal batches, and hardly ever for different ones.

    It is a CRC of shapes, dtypes, and values: all of them, or (fast enough for every batch) some thousand of each tensor.

    Example:
        >>> fingerprint({"x": torch.zeros(3)}) == fingerprint({"x": torch.zeros(3)}) != fingerprint({"x": torch.ones(3)})
        True
    """
    crc = 0
    for t in tensors_in(batch):
        crc = zlib.crc32(b"%r %r" % (t.shape, t.dtype), crc)
        if t.layout == torch.strided and t.numel():
            flat = t.detach().reshape(-1)
            step = 1 if whole else (flat.numel() - 1) // SAMPLE + 1
            crc = zlib.crc32(_bytes(flat[::step]).cpu().numpy(), crc)  # type: ignore[arg-type]
    return crc


def _digest(t: Tensor) -> tuple[int, int, int]:
    """Return (hash of shape and dtype, sum of all bytes, sum of the first half of them); the last notices another order."""
    raw = _bytes(t.detach().reshape(-1))
    shape = zlib.crc32(f"{tuple(t.shape)} {t.dtype}".encode())
    return shape, int(raw.sum(dtype=torch.int64)), int(raw[: raw.numel() // 2].sum(dtype=torch.int64))


def _bytes(flat: Tensor) -> Tensor:
    flat = flat.to(torch.uint8) if flat.dtype == torch.bool else flat.contiguous()
    return flat.view(torch.uint8) if flat.numel() else flat.to(torch.uint8)
