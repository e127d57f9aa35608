"""Boxes of tensors: offset and size by dim, and how they overlap. Stored shards and slices are boxes of a full tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_tp.errors import TPError


class Box(NamedTuple):
    """A box of a tensor: where it begins, and how far it reaches, by dim."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.size)


def full_box(shape: tuple[int, ...]) -> Box:
    """Return the box that is all of a tensor."""
    return Box((0,) * len(shape), tuple(shape))


def narrow(t: Tensor, box: Box) -> Tensor:
    """Return the view of a box of a tensor."""
    for dim, (offset, size) in enumerate(zip(*box, strict=True)):
        t = t.narrow(dim, offset, size)
    return t


def overlap(a: Box, b: Box) -> Box | None:
    """Return the box that two boxes of a tensor have in common; None if they have none."""
    low = tuple(max(i, j) for i, j in zip(a.offset, b.offset, strict=True))
    high = tuple(min(i + n, j + m) for i, n, j, m in zip(*a, *b, strict=True))
    if any(i >= j for i, j in zip(low, high, strict=True)):
        return None
    return Box(low, tuple(j - i for i, j in zip(low, high, strict=True)))


def relative(box: Box, outer: Box) -> Box:
    """Return the same box, with its offset counted from the beginning of `outer`."""
    return Box(tuple(i - j for i, j in zip(box.offset, outer.offset, strict=True)), box.size)


def assemble(box: Box, pieces: Iterable[tuple[Box, Callable[[Box], Tensor]]], dtype: torch.dtype, name: str) -> Tensor:
    """Read a box of a tensor that is stored in pieces; one piece that has all of it is not copied.

    Args:
        box: what to read.
        pieces: (the box of the full tensor that a piece is, a function that reads a box of the piece). They don't overlap.
        dtype: of the result.
        name: of the tensor, for the error.

    Raises:
        TPError: if the pieces don't cover the box.
    """
    covered, out = 0, None
    for piece, read in pieces:
        shared = overlap(piece, box)
        if shared is None:
            continue
        part = read(relative(shared, piece))
        if shared == box:
            return part.to(dtype).contiguous()
        out = torch.empty(box.size, dtype=dtype) if out is None else out
        narrow(out, relative(shared, box)).copy_(part)
        del part  # before the next one is read
        covered += shared.numel
    if covered < box.numel:
        raise TPError(f"{name}: only {covered} of {box.numel} elements are stored. The checkpoint is not complete.")
    return torch.empty(box.size, dtype=dtype) if out is None else out


def box_of_view(view: Tensor, base: Tensor) -> Box | None:
    """Return which box of a contiguous tensor a view of it is; None if it is none (a transposed one, say)."""
    offset, left = [], view.storage_offset()
    for stride in base.stride():
        offset.append(left // stride if stride else 0)
        left -= offset[-1] * stride
    size = [1] * base.ndim
    dim = -1
    for n, stride in zip(view.shape, view.stride(), strict=True):
        if n == 1:
            continue
        dim = next((d for d in range(dim + 1, base.ndim) if base.stride(d) == stride and base.shape[d] > 1), base.ndim)
        if dim == base.ndim or offset[dim] + n > base.shape[dim]:
            return None
        size[dim] = n
    return Box(tuple(offset), tuple(size))
