"""A split model's checkpoint in one file, written by rank 0 tensor by tensor: the others send it their pieces of each.

Besides what it holds anyway, rank 0 has one whole tensor and one piece of it at a time, the others nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_tp._compat import pieces_of_dtensor
from lightning_tp.checkpoint.commit import file_beside
from lightning_tp.checkpoint.storage import StoragePath
from lightning_tp.checkpoint.weights.stored import Box, Stored, narrow
from lightning_tp.checkpoint.weights.torch_file import write_torch
from lightning_tp.errors import TPError

Where = tuple[Any, ...]  # in a nesting of dicts and lists


def save_whole(tree: Any, path: StoragePath) -> None:
    """`torch.save` of a nesting in which there are DTensors, each of them whole. A collective; what is written is rank 0's.

    The file is written beside and renamed; over a file, or over a folder, of that name.

    Raises:
        TPError: on all ranks: rank 0 can't write, or another rank lacks a DTensor that rank 0 has.
    """
    found: dict[Where, DTensor] = {}
    _find(tree, (), found)
    group_rank = dist.get_rank()
    order: list[Any] = [_order(found) if group_rank == 0 else None]
    dist.broadcast_object_list(order, src=0)
    mine = [_boxes(found[p]) if p in found else None for p in order[0]]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    if lacks := [(rank, p) for rank, of in enumerate(every) for p, boxes in zip(order[0], of, strict=True) if boxes is None]:
        rank, place = lacks[0]
        raise TPError(
            f"`{'.'.join(map(str, place))}` is in the checkpoint of rank 0, and not in that of rank {rank}. Change it on all ranks alike."
        )
    owners = [_owners([of[i] for of in every]) for i in range(len(order[0]))]
    failed: list[Any] = [None]
    if group_rank == 0:
        receiver = _Receiver(found, dict(zip(order[0], owners, strict=True)))
        try:
            with file_beside(path) as temporary:
                write_torch(receiver.whole(tree, ()), temporary)
        except Exception as error:  # whatever it is, the others wait for it
            failed = [str(error) if isinstance(error, TPError) else f"`{path}` can't be written: {type(error).__name__}: {error}"]
        receiver.drain()  # the others are sending all the same
    else:
        for place, of in zip(order[0], owners, strict=True):
            held = {(at, tuple(piece.shape)): piece for at, piece in pieces_of_dtensor(found[place])}
            for box, rank in of.items():
                if rank == group_rank:
                    dist.send(held[box].detach().contiguous(), dst=0)
    dist.broadcast_object_list(failed, src=0)
    if failed[0] is not None:
        raise TPError(failed[0])


class _Receiver:
    """Rank 0's side."""

    def __init__(self, found: dict[Where, DTensor], owners: dict[Where, dict[Box, int]]) -> None:
        self.found, self.left = found, owners

    def whole(self, node: Any, place: Where) -> Any:
        """The same nesting, with something to be read in the place of each DTensor."""
        if isinstance(node, DTensor):
            return Stored(tuple(node.shape), node.dtype, lambda box, dtype: self.receive(place).to(dtype), _key(node))
        if isinstance(node, dict):
            return {k: self.whole(v, (*place, k)) for k, v in node.items()}
        return type(node)(self.whole(v, (*place, i)) for i, v in enumerate(node)) if type(node) in (list, tuple) else node

    def receive(self, place: Where) -> Tensor:
        """One whole tensor."""
        of = self.left.pop(place)
        value = self.found[place]
        held = {(at, tuple(piece.shape)): piece for at, piece in pieces_of_dtensor(value)}
        whole = torch.empty(value.shape, dtype=value.dtype)
        for box, rank in of.items():
            if rank == 0:
                narrow(whole, box).copy_(held[box])
            else:
                piece = torch.empty(box[1], dtype=value.dtype, device=value.device)
                dist.recv(piece, src=rank)
                narrow(whole, box).copy_(piece)
                del piece
        return whole

    def drain(self) -> None:
        """What was not written because of an error."""
        for place in list(self.left):
            self.receive(place)


def _find(node: Any, place: Where, found: dict[Where, DTensor]) -> None:
    if isinstance(node, DTensor):
        found[place] = node
    elif isinstance(node, dict):
        for k, v in node.items():
            _find(v, (*place, k), found)
    elif type(node) in (list, tuple):
        for i, v in enumerate(node):
            _find(v, (*place, i), found)


def _order(found: dict[Where, DTensor]) -> list[Where]:
    """In which they are written; tied ones once."""
    seen: set[Any] = set()
    order = []
    for place, value in found.items():
        key = _key(value)
        if key is None or key not in seen:
            order.append(place)
        if key is not None:
            seen.add(key)
    return order


def _key(value: DTensor) -> Any:
    """The same for two that have the same memory on this rank; None if there is none."""
    pieces = pieces_of_dtensor(value)
    return tuple((at, piece.data_ptr(), piece.stride()) for at, piece in pieces) if all(p.numel() for _, p in pieces) else None


def _boxes(value: DTensor) -> list[Box]:
    return [(tuple(at), tuple(piece.shape)) for at, piece in pieces_of_dtensor(value) if piece.numel()]


def _owners(every: list[list[Box]]) -> dict[Box, int]:
    """Which rank gives each box: the first that holds it."""
    owners: dict[Box, int] = {}
    for rank, boxes in enumerate(every):
        for box in boxes:
            owners.setdefault(box, rank)
    return owners
