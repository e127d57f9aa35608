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
from lightning.pytorch.utilities.model_summary.model_summary import LayerSummary, get_human_readable_count
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only
from torchmetrics import Metric, metric
from torchmetrics.utilities.distributed import gather_all_tensors
from typing_extensions import override

from lightning_tp._compat import local_tensor
from lightning_tp.core.comm.mesh import DATA_PARALLEL, TENSOR_PARALLEL
from lightning_tp.core.ops.split_logits import SplitLogits
from lightning_tp.trainer.patches import private
from lightning_tp.trainer.patches.replaced import replaced


@contextmanager
def metrics_over_data_parallel(trainer: pl.Trainer, mesh: DeviceMesh, module: nn.Module) -> Iterator[None]:
    """While a Trainer runs, reduce metrics over the data-parallel axis only, and let its callbacks count each sample once.

    Args:
        trainer: Its callbacks have been set up.
        mesh: The strategy's.
        module: Its metrics are reduced over the data-parallel axis afterwards, too.
    """
    gather = GatherOverDataParallel(mesh.get_group(DATA_PARALLEL))
    with ExitStack() as stack:
        stack.enter_context(replaced(metric, "gather_all_tensors", lambda own: gather))
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
        make = lambda own: lambda trainer, pl_module: FullSummary(pl_module, max_depth=depth)  # noqa: E731
        stack.enter_context(replaced(callback, "_summary", make))
    elif isinstance(callback, BasePredictionWriter) and mesh.get_local_rank(TENSOR_PARALLEL):
        for name in ("write_on_batch_end", "write_on_epoch_end"):
            stack.enter_context(replaced(callback, name, lambda own: lambda *args, **kwargs: None))


# --------------------------------------------------------------------------------------------------------------- tensors


def full_tensors(tree: Any) -> Any:
    """Replace every DTensor and every SplitLogits in a nesting by its full tensor. A collective, if there are any."""
    return tree_map_only(Tensor, _full, tree)


def _full(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, (DTensor, SplitLogits)) else t


def _log_full_tensors(own: Callable[..., None]) -> Callable[..., None]:
    def log(self: Any, fx: str, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        own(self, fx, name, _full(value) if isinstance(value, Tensor) else value, *args, **kwargs)

    return log


def reduce_over(tensor: Tensor, group: dist.ProcessGroup, reduce_op: Any) -> Tensor:
    """Reduce a tensor over the ranks of a group, as Lightning does, but take the mean of integers in floating point."""
    if not tensor.is_floating_point() and reduce_op in ("mean", "avg"):
        tensor = tensor.to(torch.float64 if tensor.device.type != "mps" else torch.float32)
    return private.sync_over_group(tensor, group, reduce_op=reduce_op)


def all_gather(tensor: Tensor, group: dist.ProcessGroup, *, sync_grads: bool = False) -> Tensor:
    """All-gather a tensor: (..) on each rank of the group -> (size of the group, ..).

    Args:
        tensor: Of the same shape on all ranks.
        group: The data-parallel axis, as a rule.
        sync_grads: Sum the gradients of all ranks, and hand each rank those of its own tensor.
    """
    tensor = _full(tensor)
    if sync_grads and torch.is_grad_enabled():
        return _AllGather.apply(tensor, group)
    return _gathered(tensor.detach(), group)


def _gathered(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    if group.size() == 1:
        return tensor.unsqueeze(0)
    tensor = tensor.contiguous()
    every = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(every, tensor, group=group)
    return torch.stack(every)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gathered(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.group.rank()], None


class GatherOverDataParallel:
    """Gather the states of a torchmetrics metric over the data-parallel axis, unless the metric was given a group.

    Copies of a metric share it; a metric that is pickled goes without.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, result: Tensor, group: Any = None) -> list[Tensor]:
        result = _full(result)
        if group is not None and group is not dist.group.WORLD:
            return gather_all_tensors(result, group)
        return [result] if self.group.size() == 1 else gather_all_tensors(result, self.group)

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
        """Make one that goes on from another one, and shares its history."""
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
    """Count the elements of the full parameters of a module."""
    parameters = [p for p in module.parameters() if p.requires_grad or not trainable]
    return sum(math.prod(p._tp_shard.shape) if hasattr(p, "_tp_shard") else p.numel() for p in parameters)


class FullLayer(LayerSummary):
    """A row of the summary, counted when it is made: FSDP2 replaces parameters in a forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.full = _num_full(module)
        self.local = sum(local_tensor(p).numel() for p in module.parameters())

    @property
    @override
    def num_parameters(self) -> int:
        return self.full


class FullSummary(Summary):
    """Lightning's summary with the parameters of the full model, and those of this rank beside them.

    Args:
        model: The LightningModule.
        max_depth: As in Lightning's.
    """

    def __init__(self, model: pl.LightningModule, max_depth: int) -> None:
        self.root, self.depth = model, max_depth
        super().__init__(model, max_depth=max_depth)

    @override
    def summarize(self) -> dict[str, LayerSummary]:
        layers = {name: FullLayer(module) for name, module in self.named_modules}
        self.total, self.trainable = FullLayer(self.root), _num_full(self.root, trainable=True)
        super().summarize()  # runs the example, if there is one, and so fills in the sizes
        for layer in (self.total, *layers.values()):
            layer.detach_hook()
        self.rows = {name: layer for name, layer in layers.items() if self.depth < 1 or name.count(".") < self.depth}
        return dict(self.rows)

    @property
    @override
    def total_parameters(self) -> int:
        return self.total.full

    @property
    @override
    def trainable_parameters(self) -> int:
        return self.trainable

    @override
    def _get_summary_data(self) -> list[tuple[str, list[str]]]:
        data = super()._get_summary_data()
        local = [row.local for row in self.rows.values()]
        if len(data[0][1]) > len(local):  # the row of parameters that are the LightningModule's own
            local.append(max(self.total.local - sum(local), 0))
        data.insert(4, ("Params per Device", [get_human_readable_count(n) for n in local]))
        return data
