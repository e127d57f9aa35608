"""All-reduce, all-gather, reduce-scatter and slicing of plain tensors on the tensor-parallel axis."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_tp._compat import all_gather_into, all_reduce_into, reduce_scatter_into, without_torch_function
from lightning_tp.core.comm.axis import Axis, even_shard


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """Sum `x` over the ranks, in place; return it."""
    all_reduce_into(x, axis.group)
    return x


def reduce_over(x: Tensor, groups: Iterable[dist.ProcessGroup], *, largest: bool = False) -> Tensor:
    """Sum `x` over several groups, one after the other, or take the largest of each element; in place; return it."""
    for group in groups:
        if group.size() > 1:
            all_reduce_into(x, group, largest=largest)
    return x


def all_gather(x: Tensor, dim: int, length: int, axis: Axis) -> Tensor:
    """All-gather shards (.., ceil(length / tp), ..) to (.., length, ..), without the padding of the last ones."""
    with without_torch_function():  # a module that has its calls changed would look at each one in here
        x = x.contiguous()
        shape, tp = x.shape, axis.size
        out = x.new_empty((tp * shape[0], *shape[1:]))
        all_gather_into(out, x, axis.group)
        if dim == 0 or (dim == 1 and shape[0] == 1):  # the shards lie behind each other already
            whole = out if dim == 0 else out.view(1, tp * shape[1], *shape[2:])
            return whole if tp * shape[dim] == length else whole.narrow(dim, 0, length)
        shards = out.chunk(tp)
        if tp * shape[dim] != length:  # cut before they are joined: code that calls `view` counts on a contiguous whole
            shards = tuple(s.narrow(dim, 0, len(even_shard(length, rank, tp))) for rank, s in enumerate(shards))
        return torch.cat(shards, dim)


def reduce_scatter(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Sum terms (.., length, ..) over the ranks and return this rank's shard (.., ceil(length / tp), ..), padded with zeros."""
    with without_torch_function():
        tp, shape = axis.size, x.shape
        if dim == 1 and shape[0] > 1 and x.stride(0) < x.stride(1) and x.transpose(0, 1).is_contiguous():
            return reduce_scatter(x.transpose(0, 1), 0, axis).transpose(0, 1)  # sequence first in memory: no copy, and it stays so
        if shape[dim] % tp:
            x = _pad(x, dim, tp)
            shape = x.shape
        if dim == 1 and shape[0] == 1:
            size = (1, shape[1] // tp, *shape[2:])
            rows, out = x.contiguous().view(tp, *size[1:]), x.new_empty(size)
        else:
            rows = x.contiguous() if dim == 0 else torch.cat(x.chunk(tp, dim), 0)
            out = x.new_empty((rows.shape[0] // tp, *rows.shape[1:]))
        reduce_scatter_into(out, rows, axis.group)
        return out


def shard_of(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Return this rank's shard (.., ceil(length / tp), ..) of a full tensor (.., length, ..), padded with zeros."""
    if x.shape[dim] % axis.size:
        x = _pad(x, dim, axis.size)
    shard = x.shape[dim] // axis.size
    # a copy of its own: a view would keep the whole alive
    return x.narrow(dim, axis.rank * shard, shard).clone(memory_format=torch.contiguous_format)


def width_shard_of(x: Tensor, axis: Axis) -> Tensor:
    """Return this rank's columns of a full tensor (.., width), without padding: the last ranks may have less."""
    mine = even_shard(x.shape[-1], axis.rank, axis.size)
    return x.narrow(-1, mine.start, len(mine)).clone(memory_format=torch.contiguous_format)


def _pad(x: Tensor, dim: int, tp: int) -> Tensor:
    """Zeros behind `dim` up to the next multiple of tp: every rank has to send the same size."""
    missing = -x.shape[dim] % tp
    return torch.cat((x, x.new_zeros((*x.shape[:dim], missing, *x.shape[dim + 1 :]))), dim)
