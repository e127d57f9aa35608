"""Write a sharded model's checkpoint as one file, on rank 0 and tensor by tensor: the others send it their shards of each.

Besides what it holds anyway, rank 0 has one full tensor and one shard of it at a time, the others nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_tp._compat import on_device_of, pieces_of_dtensor
from lightning_tp.checkpoint.commit import save_file
from lightning_tp.checkpoint.storage.nested import Path, leaves, map_nested
from lightning_tp.checkpoint.storage.path import StoragePath
from lightning_tp.checkpoint.weights.stored import StoredTensor
from lightning_tp.checkpoint.weights.torch_file import write_torch
from lightning_tp.core.boxes import Box, narrow
from lightning_tp.core.comm.agree import Peers
from lightning_tp.errors import TPError


def save_single_file(tree: Any, target: StoragePath) -> None:
    """Write a nesting in which there are DTensors as `torch.save` writes full tensors. A collective; what is no DTensor is rank 0's.

    `TPError` on all ranks, if rank 0 can't write, or another rank lacks a DTensor that rank 0 has.
    """
    dtensors: dict[Path, DTensor] = {path: leaf for path, leaf in leaves(tree) if isinstance(leaf, DTensor)}
    peers = Peers()
    order: list[Path] = peers.from_first(lambda: _in_order(dtensors))
    boxes_of_ranks = peers.gather({path: list(_shards(dtensors[path])) for path in order if path in dtensors})
    senders: dict[Path, dict[Box, int]] = {path: {} for path in order}  # of each box the first rank that holds it
    for rank, boxes in enumerate(boxes_of_ranks):
        for path in order:
            if path not in boxes:
                raise TPError(
                    f"`{'.'.join(map(str, path))}` is in the checkpoint of rank 0, but not in that of rank {rank}. Change the checkpoint on "
                    "all ranks alike."
                )
            for box in boxes[path]:
                senders[path].setdefault(box, rank)
    problem: str | None = None
    if peers.rank == 0:

        def stored(node: Any, path: Path) -> Any:
            """Replace a DTensor by one that is received when it is read; tied ones have the same key, and are read once."""
            if not isinstance(node, DTensor):
                return node
            return StoredTensor(tuple(node.shape), _dtype(node), lambda *_: _receive(node, senders.pop(path)), _memory(node))

        try:
            full = map_nested(stored, tree)
            save_file(target, lambda stream: write_torch(full, stream))
        except Exception as error:  # whatever it is, the others wait for it
            problem = str(error) if isinstance(error, TPError) else f"`{target}` can't be written: {type(error).__name__}: {error}"
        for path, ranks in senders.items():  # what was not written because of an error: the others send it all the same
            _receive(dtensors[path], ranks)
    else:
        for path, ranks in senders.items():
            shards = _shards(dtensors[path])
            for box, sender in ranks.items():
                if sender == peers.rank:
                    dist.send(on_device_of(dist.group.WORLD, _bytes(shards[box])), dst=0)

    def report() -> None:
        if problem is not None:
            raise TPError(problem)

    peers.from_first(report)


def _receive(dtensor: DTensor, ranks: dict[Box, int]) -> Tensor:
    """Put a full tensor together on rank 0, of its own shards and those that the others send."""
    shards = _shards(dtensor)
    dtype = _dtype(dtensor)
    full = torch.empty(dtensor.shape, dtype=dtype)
    for box, rank in ranks.items():
        if rank == 0:
            narrow(full, box).copy_(shards[box])
        else:
            received = on_device_of(dist.group.WORLD, _bytes(torch.empty(box.size, dtype=dtype)))
            dist.recv(received, src=rank)
            narrow(full, box).copy_(received.view(dtype).view(box.size))
            del received
    return full


def _in_order(dtensors: dict[Path, DTensor]) -> list[Path]:
    """Return the paths in the order in which the tensors are written; tied ones once."""
    seen: set[Any] = set()
    order = []
    for path, dtensor in dtensors.items():
        memory = _memory(dtensor)
        if memory is None or memory not in seen:
            order.append(path)
        seen.add(memory)
    return order


def _memory(dtensor: DTensor) -> Any:
    """Return what is the same for two DTensors in the same memory on this rank; None if there is none."""
    pieces = pieces_of_dtensor(dtensor)
    return tuple((at, piece.data_ptr(), piece.stride()) for at, piece in pieces) if all(p.numel() for _, p in pieces) else None


def _dtype(dtensor: DTensor) -> torch.dtype:
    """Return the dtype of what this rank holds: that of a DTensor in pieces is float32 if torch has made it, by `detach` for example."""
    return pieces_of_dtensor(dtensor)[0][1].dtype


def _bytes(shard: Tensor) -> Tensor:
    """Return a tensor's bytes in one dim: backends lack some dtypes (int16), and none of them this one."""
    return shard.detach().contiguous().view(-1).view(torch.uint8)


def _shards(dtensor: DTensor) -> dict[Box, Tensor]:
    """Return what this rank holds of a DTensor, by the boxes of the full tensor."""
    return {Box(tuple(at), tuple(piece.shape)): piece for at, piece in pieces_of_dtensor(dtensor) if piece.numel()}
