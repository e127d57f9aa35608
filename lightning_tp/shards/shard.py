"""What one rank holds of one parameter."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardPlacement

from lightning_tp._compat import (
    all_gather_within,
    dtensor_of_pieces,
    full_tensor,
    gather_rows,
    is_in_pieces,
    local_tensor,
    pieces_of_dtensor,
    strided_shard,
)
from lightning_tp.core.boxes import Box, full_box, narrow
from lightning_tp.core.comm.axis import even_shard
from lightning_tp.core.comm.mesh import DATA_PARALLEL, TENSOR_PARALLEL
from lightning_tp.errors import TPError
from lightning_tp.styles import Split

WAIT = timedelta(seconds=30)  # for other ranks to read the same full tensor


@dataclass(frozen=True)
class ParamShard:
    """What this rank holds of one parameter; kept on the parameter as `_tp_shard`.

    Args:
        name: the parameter's name from the root.
        split: how it is split over the tensor-parallel axis.
        shape: its full shape.
        mesh: the 2D mesh.
        fsdp: whether FSDP2 shards dim 0 of it further over the data-parallel axis.
        check_gradient: compare its gradients over the ranks with `split.state` in the first backward pass, also if that is `R`.
    """

    name: str
    split: Split
    shape: tuple[int, ...]
    mesh: DeviceMesh
    fsdp: bool = False
    check_gradient: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> ParamShard:
        return self

    @cached_property
    def tp_rank(self) -> int:
        """This rank's place on the tensor-parallel axis."""
        return self.mesh.get_local_rank(TENSOR_PARALLEL)

    @cached_property
    def tp(self) -> int:
        """The size of the tensor-parallel axis."""
        return self.mesh[TENSOR_PARALLEL].size()

    @cached_property
    def copies(self) -> int:
        """How many ranks hold the same elements; where it is not one number, see `parts_by_copies`."""
        copies = self.tp if self.split.dim is None else self.sum_over
        return copies if self.fsdp else copies * self.mesh[DATA_PARALLEL].size()

    @cached_property
    def sum_over(self) -> int:
        """Over how many neighbouring ranks its gradient, or the part `shared_rows` of it, is summed; 1 where it is not partial."""
        return self.split.sum_over(self.tp)

    @cached_property
    def shared_rows(self) -> tuple[int, int] | None:
        """The (start, stop) of `split.dim` in the tensor-parallel shard that ranks share; None means all of it, or nothing."""
        return self.split.shared_rows

    @cached_property
    def groups(self) -> tuple[dist.ProcessGroup, ...]:
        """The groups over which the elements that this rank holds add up to all: of the tensor-parallel axis, then of the data-parallel one."""
        tp_group = self.mesh.get_group(TENSOR_PARALLEL)
        return (tp_group, self.mesh.get_group(DATA_PARALLEL)) if self.mesh[DATA_PARALLEL].size() > 1 else (tp_group,)

    @property
    def tp_local_shape(self) -> tuple[int, ...]:
        """The shape of its tensor-parallel shard, before FSDP2."""
        return self.split.local_shape(self.shape, self.tp_rank)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of what this rank holds."""
        return (len(self.fsdp_rows()), *self.tp_local_shape[1:]) if self.shape else ()

    def fsdp_rows(self) -> range:
        """Return the rows of dim 0 of the tensor-parallel shard that FSDP2 leaves on this rank."""
        rows = self.tp_local_shape[0]
        if not self.fsdp:
            return range(rows)
        return even_shard(rows, self.mesh.get_local_rank(DATA_PARALLEL), self.mesh[DATA_PARALLEL].size())

    def summed_part(self, grad: Tensor) -> Tensor:
        """Return the part of a local gradient that is a term of a sum over ranks, as a view."""
        if self.shared_rows is None or self.split.dim is None:
            return grad
        start, stop = self._local_rows(*self.shared_rows)
        return grad.narrow(self.split.dim, start, stop - start)

    def parts_by_copies(self, grad: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Yield (part of a local gradient, how many ranks of the tensor-parallel axis hold the same)."""
        split = self.split
        if self.shared_rows is None or split.dim is None:
            yield grad, self.copies
        else:
            start, stop = self._local_rows(*self.shared_rows)
            length = grad.shape[split.dim]
            for a, b, copies in ((0, start, 1), (start, stop, self.sum_over), (stop, length, 1)):
                if b > a:
                    yield grad.narrow(split.dim, a, b - a), copies

    def _local_rows(self, start: int, stop: int) -> tuple[int, int]:
        """A range of `split.dim` of the tensor-parallel shard, in what FSDP2 leaves of it."""
        if not self.fsdp or self.split.dim != 0:
            return start, stop
        rows = self.fsdp_rows()
        clip = [min(max(i, rows.start), rows.stop) - rows.start for i in (start, stop)]
        return clip[0], clip[1]

    # ------------------------------------------------------------------------------------------------- full tensors

    def gather(self, value: Tensor) -> Tensor:
        """Return the full tensor from every rank's local one (or FSDP2's DTensor), on the device of `value`. A collective."""
        value = (full_tensor(value) if isinstance(value, DTensor) else local_tensor(value)).detach()
        if self.split.dim is None or self.tp == 1:
            return value.clone()
        sizes = [_numel(self.split.local_shape(self.shape, r)) for r in range(self.tp)]
        mine = value.new_zeros(max(sizes))
        mine[: value.numel()] = value.reshape(-1)
        every = gather_rows(mine, self.mesh.get_group(TENSOR_PARALLEL))
        full = value.new_empty(self.shape)
        for rank, (flat, size) in enumerate(zip(every, sizes, strict=True)):
            self.split.put(full, flat[:size].view(self.split.local_shape(self.shape, rank)), rank)
        return full

    def meet(self) -> None:
        """Make sure that all ranks of the tensor-parallel axis are about to gather this tensor.

        Raises:
            TPError: if some gather another one, or none.
        """
        mine = torch.tensor([zlib.crc32(self.name.encode())], device=self.mesh.device_type)
        every = mine.new_empty(self.tp)
        what = f"rank {dist.get_rank()} reads `{self.name}` in full, which takes all ranks"
        if not all_gather_within(every, mine, self.mesh.get_group(TENSOR_PARALLEL), WAIT):
            raise TPError(
                f"{what.capitalize()}, but others did not within {WAIT.seconds} s. Code that reads or saves weights has to run on every rank: "
                "move it out of `if trainer.is_global_zero:` (`rank_zero_only`, ..), or call `full_state_dict(module)` on all ranks before."
            )
        if len(set(every.tolist())) > 1:
            raise TPError(
                f"{what.capitalize()}, but another rank reads another tensor at the same time. Code that reads or saves weights has to run on "
                "every rank, in the same order."
            )

    def take(self, full: Tensor) -> Tensor:
        """Return this rank's local tensor of a full one: its tensor-parallel shard, then FSDP2's rows of it."""
        local = self.split.take(full, self.tp_rank)
        rows = self.fsdp_rows() if self.fsdp else None
        return local if rows is None else local[rows.start : rows.stop].contiguous()

    # ----------------------------------------------------------------------------------------------------- DTensors

    def boxes(self) -> list[tuple[Box, Box]]:
        """Return (box of the full tensor, the same in this rank's local one) of each box that this rank holds."""
        if not self.shape:
            return [(full_box(()), full_box(()))]
        rows = self.fsdp_rows()
        split, ndim = self.split, len(self.shape)
        ranges = ((0, self.shape[0]),) if split.dim is None else split.ranges[self.tp_rank]
        boxes = []
        at = 0
        for start, stop in ranges:
            size, offset, here = list(self.tp_local_shape), [0] * ndim, [0] * ndim
            dim = split.dim or 0
            size[dim], offset[dim], here[dim] = stop - start, start, at
            at += stop - start
            if self.fsdp:  # what FSDP2 leaves of dim 0 of the local tensor
                low, high = max(here[0], rows.start), min(here[0] + size[0], rows.stop)
                if low >= high:
                    continue
                offset[0], size[0], here[0] = offset[0] + low - here[0], high - low, low - rows.start
            if all(size):
                boxes.append((Box(tuple(offset), tuple(size)), Box(tuple(here), tuple(size))))
        return boxes

    def placements(self) -> tuple[Any, Any] | None:
        """Return torch's placements on the data- and the tensor-parallel axis; None if they can't express this."""
        split = self.split
        if not split.is_even_chunks or (self.sum_over > 1 and split.dim is not None):
            return None
        tp_placement = Replicate() if split.dim is None else ShardPlacement(split.dim)
        if not self.fsdp:
            return Replicate(), tp_placement
        if split.dim != 0:
            return ShardPlacement(0), tp_placement
        even = self.shape[0] % (self.tp * self.mesh[DATA_PARALLEL].size()) == 0
        return (strided_shard(0, self.tp), tp_placement) if even else None

    def to_dtensor(self, value: Tensor) -> DTensor:
        """Return the DTensor over the 2D mesh of which this rank holds `value`; it shares its memory."""
        local = local_tensor(value).detach()
        placements = self.placements()
        shape = torch.Size(self.shape)
        if placements is not None:
            stride = torch.empty(self.shape, device="meta").stride()
            return DTensor.from_local(local, self.mesh, placements, run_check=False, shape=shape, stride=stride)
        boxes = self.boxes()
        pieces = [narrow(local, here) for _, here in boxes]
        offsets = [offset for (offset, _), _ in boxes]
        if not pieces:  # nothing on this rank: a box without elements, behind the end
            pieces, offsets = [local.new_empty((0, *self.shape[1:]))], [(self.shape[0], *(0 for _ in self.shape[1:]))]
        dim = self.split.dim or 0
        nominal = (ShardPlacement(0) if self.fsdp else Replicate(), ShardPlacement(dim))
        return dtensor_of_pieces(pieces, offsets, self.mesh, nominal, shape)

    def to_local(self, value: Tensor, where: str) -> Tensor:
        """Return this rank's local tensor of an entry of a state dict: a DTensor over the 2D mesh, or the full tensor.

        Raises:
            TPError: if it is of another shape, or a DTensor in pieces that are not this rank's.
        """
        if tuple(value.shape) != self.shape:
            raise TPError(
                f"`{where}`: the checkpoint has the shape {tuple(value.shape)}, the model {self.shape}. It is from another model, or "
                "from one rank of a run that saved its shards as if they were full tensors."
            )
        if not isinstance(value, DTensor):
            return self.take(value)
        in_pieces, placements, boxes = is_in_pieces(value), self.placements(), self.boxes()
        # decided by what is the same on all ranks: what one holds may fit by chance, and `full_tensor` is a collective
        alike = value.device_mesh == self.mesh and (in_pieces if placements is None else value.placements == placements)
        if not alike and not in_pieces:
            return self.take(full_tensor(value))
        held = dict(pieces_of_dtensor(value))
        if not alike or any(offset not in held or tuple(held[offset].shape) != size for (offset, size), _ in boxes):
            raise TPError(
                f"`{where}`: a DTensor in pieces of another plan or mesh. Load it through a distributed checkpoint, or from the "
                "full tensors of `full_state_dict`."
            )
        like = next(iter(held.values()))  # `value.dtype` is float32 if torch has made a DTensor in pieces
        local = torch.empty(self.local_shape, dtype=like.dtype, device=like.device)
        for (offset, _), here in boxes:
            narrow(local, here).copy_(held[offset])
        return local


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def like(p: Tensor, local: Tensor) -> Tensor:
    """Return a local tensor as the parameter is: as FSDP2's DTensor, or as it is."""
    if not isinstance(p, DTensor):
        return local
    return DTensor.from_local(local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
