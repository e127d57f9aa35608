"""What callbacks ask of a Trainer: its mesh, how many batches it works on at a time, and the size of the full model."""

from __future__ import annotations

import lightning as L
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lightning_tp.core.comm.mesh import DATA_PARALLEL


def find_mesh(trainer: L.Trainer) -> DeviceMesh | None:
    """Return the strategy's mesh of data-parallel and tensor-parallel axes, if it has one."""
    mesh = getattr(trainer.strategy, "device_mesh", None)
    return mesh if isinstance(mesh, DeviceMesh) and DATA_PARALLEL in (mesh.mesh_dim_names or ()) else None


def data_parallel_size(trainer: L.Trainer) -> int:
    """Return how many different batches the ranks work on at a time."""
    mesh = find_mesh(trainer)
    return trainer.world_size if mesh is None else mesh[DATA_PARALLEL].size()


def num_global_parameters(trainer: L.Trainer, module: nn.Module) -> int | None:
    """Count the parameters of the full model, or return None where no rank can tell.

    The first of these that holds: the strategy's own `num_global_parameters`; a model that is whole on each rank (one process, DDP);
    one of DTensors, which know their global size (FSDP2, PyTorch's own tensor parallelism).
    """
    known = getattr(trainer.strategy, "num_global_parameters", None)
    if known is not None:
        return int(known() if callable(known) else known)
    is_whole = trainer.world_size == 1 or isinstance(trainer.strategy.model, DistributedDataParallel)
    if is_whole or any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        return sum(parameter.numel() for parameter in module.parameters())  # a DTensor's numel() is global
    return None
