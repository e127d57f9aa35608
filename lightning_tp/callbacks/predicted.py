"""Predict a run by `estimate`, for `Throughput` to show beside what it has measured."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_tp._compat import local_tensor, storage_key
from lightning_tp.callbacks.shards import find_mesh
from lightning_tp.core.units import size
from lightning_tp.data.sample_batch import quiet
from lightning_tp.errors import TPError
from lightning_tp.estimate.cost.hardware import guess, hardware
from lightning_tp.estimate.predict import Estimate, predict
from lightning_tp.estimate.rank.settings import Options
from lightning_tp.estimate.rank.trace_cache import TraceCache


def copy_on_meta(module: L.LightningModule) -> L.LightningModule:
    """Return a copy with its parameters on the meta device; buffers, Trainer and Fabric are shared with the original."""
    memo: dict[int, Any] = {}
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to("meta"), p.requires_grad)
    for b in module.buffers():
        memo[id(b)] = b
    for shared in (module.__dict__.get("_trainer"), module.__dict__.get("_fabric")):
        if shared is not None:
            memo[id(shared)] = shared
    return copy.deepcopy(module, memo)


def predict_run(
    twin: L.LightningModule, batch: Any, trainer: L.Trainer, plan: Any, *, optimizer: torch.optim.Optimizer | None
) -> tuple[Estimate, bool]:
    """Estimate a step of a run of the module that `copy_on_meta` copied.

    Returns:
        The estimate, and whether its times mean something: not on a CPU, nor on an unknown GPU.
    """
    mesh = find_mesh(trainer)
    if mesh is None:
        raise TPError("The Trainer has no device mesh, so there is nothing to predict.")
    strategy: Any = trainer.strategy
    device = strategy.root_device
    known = guess(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    hw = known or hardware("cpu" if device.type == "cpu" else "h100")

    def loss_of(model: Any, inputs: Any) -> Tensor:
        loss = model.training_step(inputs, 0)
        loss = loss["loss"] if isinstance(loss, dict) else loss
        if not isinstance(loss, Tensor):
            raise TPError("`training_step` returned no loss.")
        return loss

    options = Options(
        precision=str(trainer.precision),
        optimizer=_maker(optimizer) if optimizer is not None else "adamw",
        activation_checkpointing=strategy.activation_checkpointing,
        sequence_parallel=strategy.sequence_parallel,
        loss_parallel=strategy.loss_parallel,
        accumulate=trainer.accumulate_grad_batches,
        clip_gradients=bool(trainer.gradient_clip_val),
        compile=bool(strategy.compile),
    )
    with quiet(twin):
        found = predict(
            TraceCache(twin, batch, loss_of, plan), batch, mesh["data_parallel"].size(), mesh["tensor_parallel"].size(), hw, options
        )
    return found, known is not None


def _maker(optimizer: torch.optim.Optimizer) -> Any:
    """Return a function that makes an optimizer of the same class and settings for other parameters."""
    cls: Any = type(optimizer)
    taken = inspect.signature(cls.__init__).parameters
    settings = {k: v for k, v in optimizer.defaults.items() if k in taken}
    return functools.update_wrapper(functools.partial(cls, **settings), cls)


def held_bytes(module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Return the bytes of parameters and optimizer states on this rank, each storage counted once."""
    found: dict[int, int] = {}
    states = [t for o in optimizers for s in o.state.values() for t in s.values() if isinstance(t, Tensor) and t.ndim]
    for t in (*module.parameters(), *states):
        local = local_tensor(t)
        found[storage_key(local)] = local.untyped_storage().nbytes()
    return sum(found.values())


def prediction_line(found: Estimate, timed: bool, tokens_per_s: float | None, held: int, peak: int | None) -> str:
    """Format what was predicted beside what was measured: tokens, and bytes held by parameters and optimizer and at the peak."""
    m = found.memory
    parts = []
    if timed:
        measured = "" if tokens_per_s is None else f" ({tokens_per_s:,.0f} measured)"
        parts.append(f"{found.tokens_per_s:,.0f} {found.unit}/s{measured} on {found.hardware.name}")
    parts.append(f"parameters and optimizer {size(m.parameters + m.optimizer)} ({size(held)} measured)")
    measured = "" if peak is None else f" ({size(peak)} measured)"
    parts.append(f"peak memory {size(m.peak.total)}{measured}, in the {m.peak.name}")
    parts.append(f"{sum(c.count for c in found.collectives):,} collectives per step")
    return "Throughput, predicted: " + ", ".join(parts) + ("" if timed else "; no times for this device")


def kept_batch(batch: Any) -> Any:
    """Return a batch to keep: on the CPU, without gradients."""
    return tree_map_only(Tensor, lambda t: t.detach().cpu(), batch)
