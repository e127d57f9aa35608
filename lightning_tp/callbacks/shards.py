"""What each rank holds: parameters, their share of the whole model, and their bytes.

Counts are of parameters as they lie in memory: a DTensor counts with its local part, a plain tensor with all of it, a
tied weight once. Left out: buffers, gradients, activations (`torch.cuda.memory_summary` has them all).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override


@dataclass(frozen=True)
class ShardSummaryRow:
    """What one rank holds, and where in the mesh it stands."""

    rank: int
    dp_rank: int
    tp_rank: int
    num_parameters: int
    num_bytes: int


class ShardSummary(L.Callback):
    """Print once, on rank 0, what every rank holds: a table when `fit` starts, optimizer bytes after the first step.

    The share is of the whole model; it is "-" where the strategy neither keeps the model whole nor says its size.

    Args:
        max_rows: print no more ranks than this; one more line gives the least and the most of all ranks.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(accelerator="cpu", devices=1, callbacks=[ShardSummary()], logger=False, barebones=True)
    """

    def __init__(self, *, max_rows: int = 16) -> None:
        self.max_rows = max_rows
        self._optimizer_reported = False

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._optimizer_reported = False
        held = _gather(held_by_this_rank(trainer, pl_module))
        if trainer.is_global_zero:
            whole = num_global_parameters(trainer, pl_module)
            print(shard_table(held, whole, name=type(pl_module).__name__, max_rows=self.max_rows), flush=True)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._optimizer_reported or trainer.global_step == 0:  # gradients may be accumulated for some batches
            return
        self._optimizer_reported = True
        all_bytes = _gather(num_optimizer_bytes(trainer))  # every rank comes here after the same batch
        if trainer.is_global_zero:
            print(optimizer_line(all_bytes), flush=True)


def held_by_this_rank(trainer: L.Trainer, module: nn.Module) -> ShardSummaryRow:
    """Count the parameters that lie on this rank."""
    mesh = find_mesh(trainer)
    parameters = [_local(parameter) for parameter in module.parameters()]
    return ShardSummaryRow(
        rank=trainer.global_rank,
        dp_rank=_coordinate(mesh, "data_parallel", default=trainer.global_rank),
        tp_rank=_coordinate(mesh, "tensor_parallel", default=0),
        num_parameters=sum(parameter.numel() for parameter in parameters),
        num_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
    )


def num_global_parameters(trainer: L.Trainer, module: nn.Module) -> int | None:
    """Count the parameters of the whole model, or None where no rank can tell.

    First that holds: the strategy's own `num_global_parameters`; a model that is whole on each rank (one process, DDP);
    one of DTensors, which know their global size (FSDP2, PyTorch's own tensor parallelism).
    """
    told = getattr(trainer.strategy, "num_global_parameters", None)
    if told is not None:
        return int(told() if callable(told) else told)
    whole = trainer.world_size == 1 or isinstance(trainer.strategy.model, DistributedDataParallel)
    if whole or any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        return sum(parameter.numel() for parameter in module.parameters())  # a DTensor's numel() is global
    return None


def num_optimizer_bytes(trainer: L.Trainer) -> int:
    """Bytes of optimizer state on this rank, step counters included."""
    states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
    tensors = [_local(value) for state in states for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def shard_table(held: list[ShardSummaryRow], whole: int | None, *, name: str = "the model", max_rows: int = 16) -> str:
    """Lay out what each rank holds as a table of text.

    Example:
        >>> print(shard_table([ShardSummaryRow(0, 0, 0, 60, 240), ShardSummaryRow(1, 0, 1, 50, 200)], 100, name="Net"))
        Shards of Net: 100 parameters in the whole model, 2 ranks
        rank | data-parallel rank | tensor-parallel rank | parameters held | share of the whole | bytes
           0 |                  0 |                    0 |              60 |              60.0% | 240 B
           1 |                  0 |                    1 |              50 |              50.0% | 200 B
    """
    size = "an unknown number of" if whole is None else f"{whole:,}"
    head = ["rank", "data-parallel rank", "tensor-parallel rank", "parameters held", "share of the whole", "bytes"]
    rows = [
        [f"{h.rank}", f"{h.dp_rank}", f"{h.tp_rank}", f"{h.num_parameters:,}", _share(h, whole), _bytes(h.num_bytes)]
        for h in held[:max_rows]
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [f"Shards of {name}: {size} parameters in the whole model, {len(held)} rank{'s' if len(held) > 1 else ''}"]
    lines += [" | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    if len(held) > max_rows:
        counts = [h.num_parameters for h in held]
        lines.append(f"... {len(held) - max_rows} more ranks; {min(counts):,} to {max(counts):,} parameters on a rank")
    return "\n".join(lines)


def optimizer_line(all_bytes: list[int]) -> str:
    """Say how many bytes of optimizer state the ranks hold.

    Example:
        >>> optimizer_line([2048, 2048])
        'Optimizer state after the first step: 2.0 KiB on every rank'
    """
    least, most = min(all_bytes), max(all_bytes)
    where = f"{_bytes(most)} on every rank" if least == most else f"{_bytes(least)} to {_bytes(most)} on a rank"
    return f"Optimizer state after the first step: {where}"


def find_mesh(trainer: L.Trainer) -> DeviceMesh | None:
    """The strategy's mesh of data-parallel and tensor-parallel axes, if it has one."""
    mesh = getattr(trainer.strategy, "device_mesh", None)
    return mesh if isinstance(mesh, DeviceMesh) and "data_parallel" in (mesh.mesh_dim_names or ()) else None


def _coordinate(mesh: DeviceMesh | None, axis: str, *, default: int) -> int:
    return mesh.get_local_rank(axis) if mesh is not None and axis in (mesh.mesh_dim_names or ()) else default


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gather(value: Any) -> list[Any]:
    """The value of each rank, in order of rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _share(held: ShardSummaryRow, whole: int | None) -> str:
    return f"{100 * held.num_parameters / whole:.1f}%" if whole else "-"


def _bytes(num_bytes: int) -> str:
    power = min(max(num_bytes.bit_length() - 1, 0) // 10, 4)  # of 1024
    return f"{num_bytes / 1024**power:.{1 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
