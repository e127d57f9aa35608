"""Check that all ranks have the same plan, and give them the first rank's weights where theirs differ."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_tp._compat import gather_rows
from lightning_tp.apply.materialize import Values
from lightning_tp.core.digest import digest
from lightning_tp.errors import TPError
from lightning_tp.plan.checked import CheckedPlan

BUCKET = 2**25  # bytes that are broadcast at once


def same_plan_everywhere(plan: CheckedPlan, mesh: DeviceMesh) -> None:
    """Compare the hash of the plan over all ranks of the mesh.

    Raises:
        TPError: on all ranks, if they differ.
    """
    digests: list[Any] = [plan.digest]
    for axis in mesh.mesh_dim_names or ():
        gathered: list[Any] = [None] * mesh[axis].size()
        dist.all_gather_object(gathered, digests, group=mesh.get_group(axis))
        digests = [digest for of_rank in gathered for digest in of_rank]
    if len(set(digests)) > 1:
        raise TPError(
            f"The ranks have {len(set(digests))} different plans ({', '.join(dict.fromkeys(digests))}): their models or rules differ. "
            "Build the same model with the same arguments on every rank."
        )


@torch.no_grad()
def same_weights_everywhere(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give every rank the first one's parameters and buffers, where theirs differ. A collective.

    Ranks with different seeds draw different weights, and nothing in torch or Lightning makes replicated ones equal.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if t.numel() and not t.is_meta}
    _make_equal([part for t in tensors.values() for part in strided_parts(t)], mesh)


def strided_parts(t: Tensor) -> list[Tensor]:
    """Return a tensor; of a sparse one its indices and values, and none of one that keeps several values of one element (not coalesced)."""
    if t.layout == torch.strided:
        return [t]
    if t.layout == torch.sparse_coo:
        return [t.indices(), t.values()] if t.is_coalesced() else []
    by_row = t.layout in (torch.sparse_csr, torch.sparse_bsr)
    return [*((t.crow_indices(), t.col_indices()) if by_row else (t.ccol_indices(), t.row_indices())), t.values()]


@torch.no_grad()
def same_values_everywhere(values: Values, mesh: DeviceMesh) -> Values:
    """Do what `same_weights_everywhere` does with values that are drawn one after the other."""
    for names, full in values:
        _make_equal([full] if full.numel() else [], mesh)
        yield names, full


def _make_equal(tensors: list[Tensor], mesh: DeviceMesh) -> None:
    if not tensors:
        return
    device = torch.device(mesh.device_type)
    digests = _digests(tensors, device)
    for axis in mesh.mesh_dim_names or ():
        group = mesh.get_group(axis)
        if group.size() == 1:
            continue
        differ = (gather_rows(digests, group) != digests).any(0).to(torch.int32)  # (tensors,)
        dist.all_reduce(differ, dist.ReduceOp.MAX, group=group)
        if bool(differ.any()):
            _broadcast([t for t, d in zip(tensors, differ.tolist(), strict=True) if d], group, device)
            digests = _digests(tensors, device)


def _digests(tensors: list[Tensor], device: torch.device) -> Tensor:
    """(tensors,) of int64."""
    return torch.stack([digest(t).to(device) for t in tensors])


def _broadcast(tensors: list[Tensor], group: dist.ProcessGroup, device: torch.device) -> None:
    for t in tensors:
        flat = t.detach().to(device).contiguous()
        for piece in flat.view(-1).view(torch.uint8).split(BUCKET):  # backends lack some dtypes (int16), and none of them this one
            dist.broadcast(piece, group=group, group_src=0)
        t.copy_(flat)
