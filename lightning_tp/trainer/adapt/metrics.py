"""Numbers as one process would have them: each logical element counted once, over the data-parallel axis, and no sharded tensor in sight.

The ranks of one tensor-parallel group work on the same batch, so all that is summed, averaged or gathered over ranks goes over the
data-parallel axis: `self.log(sync_dist=True)`, `self.all_gather`, and torchmetrics, whose metrics gather over all ranks unless they
were told otherwise. Callbacks that count ranks are told how many there are; a prediction writer runs on the first rank of each
tensor-parallel group. All of it ends with the Trainer's run, but for the metrics of the module, which may be computed later.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors
from typing_extensions import override

from lightning_tp._compat import local_tensor, patched
from lightning_tp.core.comm.mesh import DATA_PARALLEL, TENSOR_PARALLEL
from lightning_tp.core.ops.split_logits import SplitLogits


class MetricsOverDataParallel:
    """What a strategy changes about the Trainer's counting for as long as it runs.

    Args:
        trainer: whose callbacks have been set up.
        mesh: of its strategy.
    """

    def __init__(self, trainer: pl.Trainer, mesh: DeviceMesh) -> None:
        from lightning.pytorch.trainer.connectors.logger_connector import result
        from torchmetrics import metric

        self.mesh = mesh
        self.gather = OverDataParallel(mesh.get_group(DATA_PARALLEL))
        self._undo: list[Callable[[], None]] = [
            patched(metric, "gather_all_tensors", self.gather),
            patched(result._ResultCollection, "log", _log_plain(result._ResultCollection.log)),
        ]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ThroughputMonitor):
                for stage, throughput in callback._throughputs.items():
                    callback._throughputs[stage] = _counted_once(throughput, mesh)
            elif isinstance(callback, ModelSummary):
                self._undo.append(patched(callback, "_summary", _WholeSummary.of(callback)))
            elif isinstance(callback, BasePredictionWriter) and mesh.get_local_rank(TENSOR_PARALLEL):
                for name in ("write_on_batch_end", "write_on_epoch_end"):
                    self._undo.append(patched(callback, name, _nothing))

    def close(self, module: nn.Module | None) -> None:
        """Back to as it was; the metrics of the module go on counting over the data-parallel axis."""
        while self._undo:
            self._undo.pop()()
        for m in module.modules() if module is not None else ():
            if isinstance(m, Metric) and m.dist_sync_fn is None and m.process_group is None:
                m.dist_sync_fn = self.gather


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


# --------------------------------------------------------------------------------------------------------------- tensors


def plain(tree: Any) -> Any:
    """The same nesting with every sharded tensor in it whole: a DTensor, split logits. A collective, if there are any."""
    return tree_map_only(Tensor, _plain, tree)


def _plain(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, (DTensor, SplitLogits)) else t


def _log_plain(log: Callable[..., None]) -> Callable[..., None]:
    def log_plain(self: Any, fx: str, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        log(self, fx, name, _plain(value) if isinstance(value, Tensor) else value, *args, **kwargs)

    return log_plain


def all_gather(tensor: Tensor, group: dist.ProcessGroup, *, sync_grads: bool = False) -> Tensor:
    """This tensor (..) of each rank of the group -> (size of the group, ..).

    Args:
        tensor: of the same shape on all ranks.
        group: of the data-parallel axis, as a rule.
        sync_grads: let the gradient flow back to where each part came from; the sum of all ranks' gradients.
    """
    tensor = _plain(tensor)
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


class OverDataParallel:
    """What a torchmetrics metric gathers its states with: over the data-parallel axis, unless it was given a group.

    Copies of a metric share it; one that is pickled goes without.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, result: Tensor, group: Any = None) -> list[Tensor]:
        result = _plain(result)
        if group is not None and group is not dist.group.WORLD:
            return gather_all_tensors(result, group)
        return [result] if self.group.size() == 1 else gather_all_tensors(result, self.group)

    def __deepcopy__(self, memo: dict[int, Any]) -> OverDataParallel:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


# ------------------------------------------------------------------------------------------------------------- callbacks


class _ThroughputOnce(Throughput):
    """Lightning's, whose samples are those of the data-parallel ranks, and whose FLOPs are shared by all."""

    tp: int

    @override
    def compute(self) -> dict[str, int | float]:
        metrics = super().compute()
        for name in ("flops_per_sec", "mfu"):
            key = f"device{self.separator}{name}"
            if key in metrics:
                metrics[key] /= self.tp
        return metrics


def _counted_once(throughput: Throughput, mesh: DeviceMesh) -> Throughput:
    once = _ThroughputOnce.__new__(_ThroughputOnce)
    once.__dict__.update(throughput.__dict__)
    once.world_size, once.tp = mesh[DATA_PARALLEL].size(), mesh[TENSOR_PARALLEL].size()
    return once


def _num_whole(module: nn.Module, *, trainable: bool = False) -> int:
    """Elements of the whole model's parameters of this module."""
    whole = 0
    for p in module.parameters():
        if p.requires_grad or not trainable:
            whole += math.prod(p._tp_shard.shape) if hasattr(p, "_tp_shard") else p.numel()
    return whole


class _WholeLayer(LayerSummary):
    """Counted when it is made: FSDP2 has other parameters after a forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.whole = _num_whole(module)
        self.held = sum(local_tensor(p).numel() for p in module.parameters())

    @property
    @override
    def num_parameters(self) -> int:
        return self.whole


class _WholeSummary(Summary):
    """Lightning's table with the parameters of the whole model, and those of this rank beside them."""

    _layer_summary: dict[str, _WholeLayer]  # type: ignore[assignment]

    @classmethod
    def of(cls, callback: ModelSummary) -> Callable[..., Summary]:
        """What makes the summary of this callback."""
        return lambda trainer, module: cls(module, max_depth=callback._max_depth)

    @override
    def summarize(self) -> dict[str, LayerSummary]:
        layers = {name: _WholeLayer(module) for name, module in self.named_modules}
        self._all, self._trainable = _WholeLayer(self._model), _num_whole(self._model, trainable=True)
        super().summarize()  # runs the example, if there is one, and so fills in the sizes
        for layer in (self._all, *layers.values()):
            layer.detach_hook()
        depth = self._max_depth
        return {name: layer for name, layer in layers.items() if depth < 1 or name.count(".") < depth}

    @property
    @override
    def total_parameters(self) -> int:
        return self._all.whole

    @property
    @override
    def trainable_parameters(self) -> int:
        return self._trainable

    @override
    def _get_summary_data(self) -> list[tuple[str, list[str]]]:
        data = super()._get_summary_data()
        held = [get_human_readable_count(layer.held) for layer in self._layer_summary.values()]
        if len(data[0][1]) > len(held):  # the row of parameters that are the LightningModule's own
            held.append(get_human_readable_count(max(self._all.held - sum(x.held for x in self._layer_summary.values()), 0)))
        data.insert(4, ("Params per Device", held))
        return data
