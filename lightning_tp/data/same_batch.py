"""Ranks of one tensor-parallel group have to work on the same batch: compare it, cheaply."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

from lightning_tp.errors import TPError

SAMPLE = 4096  # elements of a tensor that a quick look reads


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
    named = list(named_tensors(batch))
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
    "All ranks of a group work on one batch, and loaders give them one; so look at what changes it afterwards: let "
    "`on_before_batch_transfer`, `on_after_batch_transfer` and the like do the same on every rank, with seeded random numbers."
)


def named_tensors(batch: Any, depth: int = 3) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of all tensors in a batch: in containers, mappings of any class, and attributes of objects.

    Args:
        batch: what a loader gives.
        depth: how many objects inside each other it looks into.

    Example:
        >>> [name for name, _ in named_tensors({"x": torch.ones(1), "more": [torch.ones(2), "text"]})]
        ["['x']", "['more'][0]"]
    """
    leaves, _ = tree_flatten_with_path(batch)
    for path, leaf in leaves:
        if isinstance(leaf, Tensor):
            yield "".join(map(str, path)) or "batch", leaf
        elif depth and (inside := _inside(leaf)):
            for below, t in named_tensors(inside, depth - 1):
                yield "".join(map(str, path)) + below, t


_PLAIN = (str, bytes, int, float, complex, type(None))


def _inside(leaf: Any) -> dict[str, Any] | None:
    """What torch does not look into: a mapping of another class (Hugging Face's BatchEncoding), an object with attributes."""
    if isinstance(leaf, _PLAIN) or callable(leaf) or isinstance(leaf, Iterator):
        return None
    return dict(leaf) if isinstance(leaf, Mapping) else getattr(leaf, "__dict__", None)


def _tensors(batch: Any, depth: int) -> Iterator[Tensor]:
    """The tensors of `named_tensors`, faster: this runs for every batch."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (dict, list, tuple)):
        for item in batch.values() if isinstance(batch, dict) else batch:
            yield from _tensors(item, depth)
    elif depth and (inside := _inside(batch)):
        for item in inside.values():
            yield from _tensors(item, depth - 1)


def _digest(t: Tensor) -> tuple[int, int, int]:
    """(shape and dtype, sum of all bytes, sum of the first half's): the last tells another order."""
    raw = _bytes(t.detach().reshape(-1))
    shape = zlib.crc32(f"{tuple(t.shape)} {t.dtype}".encode())
    return shape, int(raw.sum(dtype=torch.int64)), int(raw[: raw.numel() // 2].sum(dtype=torch.int64))


def _bytes(flat: Tensor) -> Tensor:
    flat = flat.to(torch.uint8) if flat.dtype == torch.bool else flat.contiguous()
    return flat.view(torch.uint8) if flat.numel() else flat.to(torch.uint8)


def fingerprint(batch: Any, *, whole: bool = False) -> int:
    """A number below 2**32 that equal batches share, and different ones hardly: of all shapes, and of values at even distances.

    Args:
        batch: any nesting of tensors.
        whole: look at all values, not at some thousand of each tensor.

    Example:
        >>> fingerprint({"x": torch.zeros(3)}) == fingerprint({"x": torch.zeros(3)}) != fingerprint({"x": torch.ones(3)})
        True
    """
    crc = 0
    for t in _tensors(batch, 3):
        crc = zlib.crc32(b"%r %r" % (t.shape, t.dtype), crc)
        if t.layout == torch.strided and t.numel():
            flat = t.detach().reshape(-1)
            step = 1 if whole else (flat.numel() - 1) // SAMPLE + 1
            crc = zlib.crc32(_bytes(flat[::step]).cpu().numpy(), crc)  # type: ignore[arg-type]
    return crc
