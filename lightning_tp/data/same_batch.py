"""Compare batches between the ranks of a tensor-parallel group, which all have to work on the same one."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_tp._compat import gather_rows
from lightning_tp.core.digest import as_bytes, digest, value_digest
from lightning_tp.core.trees import leaves_in, named_leaves_in
from lightning_tp.errors import TPError

SAMPLE = 4096  # elements of a tensor that a quick fingerprint reads

_REMEDY = (
    "All ranks of a group have to work on the same batch. Loaders give them the same one, so look at what changes it afterwards: let "
    "`on_before_batch_transfer`, `on_after_batch_transfer` and the like do the same on every rank, with seeded random numbers."
)


def check_same_batch(batch: Any, group: dist.ProcessGroup, device: torch.device, where: str) -> None:
    """Compare a batch over the ranks of a group: shapes, dtypes and every byte of each tensor, text and numbers. A collective on `device`.

    Of objects that are neither, nor containers or NumPy arrays, only the classes are compared. `TPError`, which calls the batch `where`, on every
    rank of the group if they differ.
    """
    named = [(name or "batch", leaf) for name, leaf in named_leaves_in(batch)]
    mine = torch.tensor([_digest(leaf) for _, leaf in named], dtype=torch.int64, device=device).view(len(named), 2)
    counts = gather_rows(torch.tensor([len(named)], device=device), group).flatten().tolist()
    if len(set(counts)) > 1:
        raise TPError(
            f"{where}: the ranks of one tensor-parallel group have {counts} tensors and other values in their batches. {_REMEDY}"
        )
    if not named:
        return
    digests = gather_rows(mine, group)  # (ranks, values, 2)
    for i, (name, leaf) in enumerate(named):
        differ = [rank for rank, digest in enumerate(digests) if not torch.equal(digest[i], digests[0][i])]
        if differ:
            what = "shape or dtype" if any(int(digests[rank][i, 0]) != int(digests[0][i, 0]) for rank in differ) else "values"
            shown = tuple(leaf.shape) if isinstance(leaf, Tensor) else f"({type(leaf).__name__})"
            raise TPError(
                f"{where}: `{name}` {shown} differs inside a tensor-parallel group: the {what} on ranks {differ} of "
                f"{group.size()} differ from those on rank 0. {_REMEDY}"
            )


def fingerprint(batch: Any, *, whole: bool = False) -> int:
    """Return a number below 2**32 that is the same for equal batches, and hardly ever for different ones.

    It is a CRC of shapes, dtypes, text, numbers, and values of tensors: all of them, or (fast enough for every batch) some thousand of each.

    Example:
        >>> fingerprint({"x": torch.zeros(3)}) == fingerprint({"x": torch.zeros(3)}) != fingerprint({"x": torch.ones(3)})
        True
    """
    crc = 0
    for leaf in leaves_in(batch):
        if not isinstance(leaf, Tensor):
            crc = zlib.crc32(b"%d" % value_digest(leaf), crc)
            continue
        crc = zlib.crc32(b"%r %r" % (leaf.shape, leaf.dtype), crc)
        if leaf.layout == torch.strided and leaf.numel():
            flat = leaf.detach().reshape(-1)
            step = 1 if whole else (flat.numel() - 1) // SAMPLE + 1
            crc = zlib.crc32(as_bytes(flat[::step]).cpu().numpy(), crc)  # type: ignore[arg-type]
    return crc


def _digest(leaf: Any) -> tuple[int, int]:
    """Return (hash of shape and dtype, or of the class; digest of the values)."""
    if not isinstance(leaf, Tensor):
        return zlib.crc32(type(leaf).__qualname__.encode()), value_digest(leaf)
    values = leaf.to_dense() if leaf.layout != torch.strided else leaf
    return zlib.crc32(f"{tuple(leaf.shape)} {leaf.dtype}".encode()), int(digest(values))
