"""Check that all ranks have the same plan, and give them the first rank's weights where theirs differ."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_tp.apply import materialize
from lightning_tp.errors import TPError
from lightning_tp.plan.checked import CheckedPlan

BUCKET = 2**23  # elements that are broadcast at once


def same_plan_everywhere(plan: CheckedPlan, mesh: DeviceMesh) -> None:
    """Compare the hash of the plan over all ranks of the mesh.

    Raises:
        TPError: on all ranks, if they differ.
    """
    digests: list[Any] = [plan.digest]
    for axis in mesh.mesh_dim_names or ():
        gathered: list[Any] = [None] * mesh[axis].size()
        dist.all_gather_object(gathered, digests, group=mesh.get_group(axis))
        digests = [d for of in gathered for d in of]
    if len(set(digests)) > 1:
        raise TPError(
            f"The ranks have {len(set(digests))} different plans ({', '.join(dict.fromkeys(digests))}): their models or rules differ. "
            "Build the same model with the same arguments on every rank."
        )


@torch.no_grad()
def same_weights_everywhere(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give every rank the first one's parameters and buffers, where they are not equal already.

    Ranks that were not seeded alike draw different weights, and nothing in torch or Lightning makes replicated ones equal.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if t.numel() and not t.is_meta}
    _make_equal(list(tensors.values()), mesh)


@torch.no_grad()
def same_values_everywhere(values: materialize.Values, mesh: DeviceMesh) -> materialize.Values:
    """The same for values that are drawn one after the other."""
    for names, whole in values:
        _make_equal([whole] if whole.numel() else [], mesh)
        yield names, whole


def _make_equal(tensors: list[Tensor], mesh: DeviceMesh) -> None:
    if not tensors:
        return
    target = torch.device(mesh.device_type)
    sums = torch.stack([_checksum(t) for t in tensors]).to(target)
    for axis in mesh.mesh_dim_names or ():
        group = mesh.get_group(axis)
        if group.size() == 1:
            continue
        every = sums.new_empty((group.size() * sums.shape[0], *sums.shape[1:]))
        group._allgather_base(every, sums).wait()
        differ = (every.view(group.size(), *sums.shape) != sums).flatten(2).any(2).any(0)
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
        flags = differ.to(torch.int32)
        group.allreduce([flags], options).wait()
        _broadcast([t for t, d in zip(tensors, flags.tolist(), strict=True) if d], group, target)
        sums = torch.stack([_checksum(t) for t in tensors]).to(target) if bool(flags.any()) else sums


def _checksum(t: Tensor) -> Tensor:
    """Two exact sums over the bytes of a tensor, of which one knows their order."""
    raw = t.detach().contiguous().view(-1).view(torch.uint8) if t.dtype != torch.bool else t.detach().reshape(-1).to(torch.uint8)
    half = raw[: raw.numel() // 2].sum(dtype=torch.int64)
    return torch.stack((raw.sum(dtype=torch.int64), half)).cpu()


def _broadcast(tensors: list[Tensor], group: dist.ProcessGroup, device: torch.device) -> None:
    for t in tensors:
        flat = t.detach().to(device).contiguous()
        for piece in flat.view(-1).split(BUCKET):
            dist.broadcast(piece, group=group, group_src=0)
        t.copy_(flat)
