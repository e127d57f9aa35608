"""What `estimate` predicts for a run, beside what was measured: for `Throughput`."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_tp._compat import local_tensor
from lightning_tp.callbacks.trainer_info import find_mesh
from lightning_tp.core.units import size
from lightning_tp.data.sample_batch import quiet
from lightning_tp.errors import TPError
from lightning_tp.estimate.cost.hardware import guess, hardware
from lightning_tp.estimate.predict import Options, predict
from lightning_tp.estimate.report import Estimate
from lightning_tp.estimate.trace.traces import TraceCache


def twin_of(module: L.LightningModule) -> L.LightningModule:
    """A copy without weights: parameters on the meta device, everything else that is large shared."""
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
    """(the estimate for a step of this run, whether its times mean something: not on a CPU, or a device that is not known).

    Raises:
        TPError: if the step can't be followed without weights.
    """
    mesh = find_mesh(trainer)
    if mesh is None:
        raise TPError("There is no mesh.")
    strategy: Any = trainer.strategy
    device = strategy.root_device
    known = guess(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    hw = known or hardware("cpu" if device.type == "cpu" else "h100")

    def loss_of(model: nn.Module, inputs: Any) -> Tensor:
        step: Any = model
        loss = step.training_step(inputs, 0)
        loss = loss["loss"] if isinstance(loss, dict) else loss
        if not isinstance(loss, Tensor):
            raise TPError("The training step returns no loss.")
        return loss

    options = Options(
        precision=str(trainer.precision),
        optimizer=_like(optimizer) if optimizer is not None else "adamw",
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


def _like(optimizer: torch.optim.Optimizer) -> Any:
    """One of the same class and settings, for other parameters."""
    optimizer = getattr(optimizer, "_optimizer", optimizer)
    cls: Any = type(optimizer)
    taken = inspect.signature(cls.__init__).parameters
    settings = {k: v for k, v in optimizer.defaults.items() if k in taken}

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = cls(parameters, **settings)
        return made

    make.__name__ = cls.__name__
    return make


def held_bytes(module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Bytes of parameters and the optimizers' states on this rank, each storage counted once."""
    found: dict[int, int] = {}
    states = [t for o in optimizers for s in o.state.values() for t in s.values() if isinstance(t, Tensor) and t.ndim]
    for t in (*module.parameters(), *states):
        storage = local_tensor(t).untyped_storage()
        found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def line(found: Estimate, timed: bool, tokens_per_s: float | None, held: int, peak: int | None) -> str:
    """Predicted beside measured, to read."""
    m = found.memory
    parts = []
    if timed:
        measured = "" if tokens_per_s is None else f" ({tokens_per_s:,.0f} measured)"
        parts.append(f"{found.tokens_per_s:,.0f} {found.unit}/s{measured} on {found.hardware.name}")
    parts.append(f"parameters and optimizer {size(m.parameters + m.optimizer)} ({size(held)} measured)")
    measured = "" if peak is None else f" ({size(peak)} measured)"
    parts.append(f"at the peak {size(m.peak.total)}{measured}, {m.peak.name}")
    parts.append(f"{sum(c.count for c in found.collectives):,} collectives a step")
    return "Throughput, predicted: " + ", ".join(parts) + ("" if timed else "; no times for this device")


def first_of(batch: Any) -> Any:
    """A batch, to keep: on the CPU, without gradients."""
    return tree_map_only(Tensor, lambda t: t.detach().cpu(), batch)
