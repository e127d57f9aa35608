"""What each rank holds: parameters, their share of the full model, and their bytes.

Counts are of parameters as they lie in memory: a DTensor counts with its local shard, a plain tensor with all of it, a
tied weight once. Not covered: buffers, gradients, activations (`torch.cuda.memory_summary` has them all).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_tp._compat import local_tensor
from lightning_tp.core.comm.agree import Peers
from lightning_tp.core.comm.mesh import DATA_PARALLEL
from lightning_tp.core.tables import table
from lightning_tp.core.units import size


@dataclass(frozen=True)
class ShardSummaryRow:
    """What one rank holds, and its position in the mesh."""

    rank: int
    dp_rank: int
    tp_rank: int
    num_parameters: int
    num_bytes: int


class ShardSummary(L.Callback):
    """Print once, on rank 0, what every rank holds: a table when `fit` starts, the bytes of optimizer state after the first step.

    The share is of the full model; it is "-" where the strategy neither keeps the model whole nor knows its size.

    Args:
        max_rows: Print at most this many ranks; one more line gives the smallest and the largest count of all ranks.

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
        rows = Peers().gather(shard_of_this_rank(trainer, pl_module))
        if trainer.is_global_zero:
            total = num_global_parameters(trainer, pl_module)
            print(shard_table(rows, total, name=type(pl_module).__name__, max_rows=self.max_rows), flush=True)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._optimizer_reported or trainer.global_step == 0:  # gradients may be accumulated for some batches
            return
        self._optimizer_reported = True
        num_bytes = Peers().gather(num_optimizer_bytes(trainer))  # every rank comes here after the same batch
        if trainer.is_global_zero:
            print(optimizer_line(num_bytes), flush=True)


def shard_of_this_rank(trainer: L.Trainer, module: nn.Module) -> ShardSummaryRow:
    """Count the parameters that this rank holds."""
    mesh = find_mesh(trainer)
    dp_rank, tp_rank = (trainer.global_rank, 0) if mesh is None else mesh.get_coordinate() or (0, 0)
    shards = [local_tensor(parameter) for parameter in module.parameters()]
    return ShardSummaryRow(
        rank=trainer.global_rank,
        dp_rank=dp_rank,
        tp_rank=tp_rank,
        num_parameters=sum(shard.numel() for shard in shards),
        num_bytes=sum(shard.nbytes for shard in shards),
    )


def num_optimizer_bytes(trainer: L.Trainer) -> int:
    """Count the bytes of optimizer state on this rank, step counters included."""
    states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
    return sum(local_tensor(value).nbytes for state in states for value in state.values() if isinstance(value, Tensor))


def shard_table(rows: list[ShardSummaryRow], total: int | None, *, name: str = "the model", max_rows: int = 16) -> str:
    """Format what the ranks hold of a model with `total` parameters as a table.

    Example:
        >>> print(shard_table([ShardSummaryRow(0, 0, 0, 60, 240), ShardSummaryRow(1, 0, 1, 50, 200)], 100, name="Net"))
        Shards of Net: 100 parameters in total, 2 ranks
          rank  dp rank  tp rank  parameters  share       size
             0        0        0          60  60.0%  240 bytes
             1        0        1          50  50.0%  200 bytes
    """
    header = ["rank", "dp rank", "tp rank", "parameters", "share", "size"]
    cells = []
    for row in rows[:max_rows]:
        share = f"{row.num_parameters / total:.1%}" if total else "-"
        cells.append([str(row.rank), str(row.dp_rank), str(row.tp_rank), f"{row.num_parameters:,}", share, size(row.num_bytes)])
    in_total = "an unknown number of" if total is None else f"{total:,}"
    lines = [f"Shards of {name}: {in_total} parameters in total, {len(rows)} rank{'s' if len(rows) > 1 else ''}"]
    lines.append(table(header, cells, right=range(len(header))))
    if len(rows) > max_rows:
        counts = [row.num_parameters for row in rows]
        lines.append(f"  .. and {len(rows) - max_rows} more ranks; {min(counts):,} to {max(counts):,} parameters per rank")
    return "\n".join(lines)


def optimizer_line(num_bytes: list[int]) -> str:
    """Format the bytes of optimizer state of all ranks as one line."""
    least, most = min(num_bytes), max(num_bytes)
    per_rank = size(most) if least == most else f"{size(least)} to {size(most)}"
    return f"Optimizer state after the first step: {per_rank} per rank"


def find_mesh(trainer: L.Trainer) -> DeviceMesh | None:
    """Return the strategy's mesh of data-parallel and tensor-parallel axes, if it has one."""
    mesh = getattr(trainer.strategy, "device_mesh", None)
    return mesh if isinstance(mesh, DeviceMesh) and DATA_PARALLEL in (mesh.mesh_dim_names or ()) else None


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
