"""Metrics as in one process: each sample counts once, over the data-parallel axis, and no sharded tensor is logged or returned.

The ranks of one tensor-parallel group work on the same batch, so what is summed, averaged or gathered over ranks goes over the data-parallel
axis: `self.log(sync_dist=True)`, `self.all_gather`, and torchmetrics, whose metrics gather over all ranks unless told otherwise. Callbacks that
count ranks get the number of data-parallel ones; a prediction writer runs on the first rank of each tensor-parallel group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.throughput import Throughput
from lightning.pytorch.callbacks import BasePredictionWriter, ModelSummary, ThroughputMonitor
from lightning.pytorch.utilities.model_summary import ModelSummary as Summary
from lightning.pytorch.utilities.model_summary.model_summary import get_human_readable_count
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only
from torchmetrics import Metric, metric
from torchmetrics.utilities.distributed import gather_all_tensors
from typing_extensions import override

from lightning_tp._compat import full_tensor, local_tensor, on_device_of
from lightning_tp.core.comm.mesh import DATA_PARALLEL, TENSOR_PARALLEL
from lightning_tp.core.ops.split_logits import SplitLogits
from lightning_tp.trainer.patches import private
from lightning_tp.trainer.patches.replaced import replaced


@contextmanager
def metrics_over_data_parallel(trainer: pl.Trainer, mesh: DeviceMesh, module: nn.Module) -> Iterator[None]:
    """While a Trainer runs, reduce metrics over the data-parallel axis only, and let its callbacks count each sample once.

    The metrics of `module` are reduced over that axis afterwards, too.
    """
    gather = GatherOverDataParallel(mesh.get_group(DATA_PARALLEL))
    with ExitStack() as stack:
        stack.enter_context(replaced(metric, "gather_all_tensors", lambda own, *args, **kwargs: gather(*args, **kwargs)))
        stack.enter_context(replaced(private.ResultCollection, "log", _log_full_tensors))
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            _adapt(callback, mesh, stack)
        try:
            yield
        finally:
            for m in module.modules():
                if isinstance(m, Metric) and m.dist_sync_fn is None and m.process_group is None:
                    m.dist_sync_fn = gather


def _adapt(callback: Any, mesh: DeviceMesh, stack: ExitStack) -> None:
    if isinstance(callback, ThroughputMonitor):
        throughputs = private.throughputs_of(callback)  # made for this run
        throughputs.update({stage: MeshThroughput.like(own, mesh) for stage, own in throughputs.items()})
    elif isinstance(callback, ModelSummary):
        depth = private.summary_depth(callback)
        stack.enter_context(replaced(callback, "_summary", lambda own, trainer, module: FullSummary(module, max_depth=depth)))
    elif isinstance(callback, BasePredictionWriter) and mesh.get_local_rank(TENSOR_PARALLEL):
        for name in ("write_on_batch_end", "write_on_epoch_end"):
            stack.enter_context(replaced(callback, name, lambda own, *args, **kwargs: None))


# --------------------------------------------------------------------------------------------------------------- tensors


def full_tensors(tree: Any) -> Any:
    """Replace every DTensor and every SplitLogits in a nesting by its full tensor. A collective, if there are any."""
    return tree_map_only(Tensor, _full, tree)


def _full(t: Tensor) -> Tensor:
    return full_tensor(t) if isinstance(t, DTensor) else t.full_tensor() if isinstance(t, SplitLogits) else t


def _log_full_tensors(own: Callable[..., None], results: Any, fx: str, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
    own(results, fx, name, _full(value) if isinstance(value, Tensor) else value, *args, **kwargs)


def reduce_over(tensor: Tensor, group: dist.ProcessGroup, reduce_op: Any) -> Tensor:
    """Reduce a tensor over the ranks of a group, as Lightning does, but take the mean of integers in floating point."""
    if not tensor.is_floating_point() and reduce_op in ("mean", "avg"):
        tensor = tensor.to(torch.float64 if tensor.device.type != "mps" else torch.float32)
    return private.sync_over_group(on_device_of(group, tensor), group, reduce_op=reduce_op).to(tensor.device)


def all_gather(tensor: Tensor, group: dist.ProcessGroup, *, sync_grads: bool = False) -> Tensor:
    """All-gather a tensor: (..) on each rank of the group -> (size of the group, ..); with `sync_grads` the backward pass sums over the ranks."""
    tensor = _full(tensor)
    if sync_grads and torch.is_grad_enabled():
        return _AllGather.apply(tensor, group)
    return _gathered(tensor.detach(), group)


def _gathered(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    if group.size() == 1:
        return tensor.unsqueeze(0)
    sent = on_device_of(group, tensor).contiguous()
    every = [torch.empty_like(sent) for _ in range(group.size())]
    dist.all_gather(every, sent, group=group)
    return torch.stack(every).to(tensor.device)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = on_device_of(ctx.group, grad).clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total[ctx.group.rank()].to(grad.device), None


class GatherOverDataParallel:
    """Gather the states of a metric over the data-parallel axis, unless it has a group; copies of it share this, a pickled one goes without."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, result: Tensor, group: Any = None) -> list[Tensor]:
        result = _full(result)
        if group is None or group is dist.group.WORLD:
            group = self.group
            if group.size() == 1:
                return [result]
        return [every.to(result.device) for every in gather_all_tensors(on_device_of(group, result), group)]

    def __deepcopy__(self, memo: dict[int, Any]) -> GatherOverDataParallel:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


# ------------------------------------------------------------------------------------------------------------- callbacks


class MeshThroughput(Throughput):
    """Lightning's Throughput, with the samples of the data-parallel ranks, and FLOPs that a tensor-parallel group shares."""

    tp: int

    @classmethod
    def like(cls, other: Throughput, mesh: DeviceMesh) -> MeshThroughput:
        """Make one that continues another one, and shares its history."""
        made = cls.__new__(cls)
        made.__dict__.update(other.__dict__)
        made.world_size, made.tp = mesh[DATA_PARALLEL].size(), mesh[TENSOR_PARALLEL].size()
        return made

    @override
    def compute(self) -> dict[str, int | float]:
        metrics = super().compute()
        for name in ("flops_per_sec", "mfu"):
            key = f"device{self.separator}{name}"
            if key in metrics:
                metrics[key] /= self.tp
        return metrics


def _num_full(module: nn.Module, *, trainable: bool = False) -> int:
    parameters = [p for p in module.parameters() if p.requires_grad or not trainable]
    return sum(math.prod(p._tp_shard.shape) if hasattr(p, "_tp_shard") else p.numel() for p in parameters)


class FullSummary(Summary):
    """Lightning's summary with the parameters of the full model, and those of this rank beside them.

    They are counted before the example of the model runs: FSDP2 replaces parameters in a forward.
    """

    def __init__(self, model: pl.LightningModule, max_depth: int) -> None:
        modules = dict(model.named_modules())
        self.full = {name: _num_full(module) for name, module in modules.items()}
        self.local = {name: sum(local_tensor(p).numel() for p in module.parameters()) for name, module in modules.items()}
        self.trainable = _num_full(model, trainable=True)
        super().__init__(model, max_depth=max_depth)

    @property
    @override
    def param_nums(self) -> list[int]:
        return [self.full[name] for name in self.layer_names]

    @property
    @override
    def total_parameters(self) -> int:
        return self.full[""]

    @property
    @override
    def trainable_parameters(self) -> int:
        return self.trainable

    @override
    def _get_summary_data(self) -> list[tuple[str, list[str]]]:
        data = super()._get_summary_data()
        local = [self.local[name] for name in self.layer_names]
        if len(data[0][1]) > len(local):  # the row of parameters that are the LightningModule's own
            local.append(max(self.local[""] - sum(local), 0))
        data.insert(4, ("Params per Device", [get_human_readable_count(n) for n in local]))
        return data
