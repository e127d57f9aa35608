"""A short training run, the same in a single process and on every rank: the model, its inputs and loss, and a few steps of plain SGD."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_tp.apply.parallelize import PlanLike
from lightning_tp.core.loss_fn import loss_from
from lightning_tp.core.trees import map_tensors, tensors_in
from lightning_tp.errors import TPError
from lightning_tp.plan.checked import CheckedPlan
from lightning_tp.shards.state_dict import full_gradients, full_state_dict

FIRST_STEP = 1e-2  # how far the default learning rate moves the weights, relative to their norm

Inputs = Mapping[str, Any] | tuple[Any, ...]


@dataclass(frozen=True)
class Task:
    """The arguments of `verify`, as the processes get them."""

    model_fn: Callable[[], nn.Module]
    inputs: Inputs | Callable[[], Inputs]
    loss_fn: Callable[..., Tensor]
    tp: int
    dp: int
    plan: PlanLike | None
    steps: int
    rtol: float
    lr: float | None
    sequence_parallel: bool
    loss_parallel: bool
    seed: int

    def __post_init__(self) -> None:
        for name in ("tp", "dp", "steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise TPError(f"`verify({name}={value!r})`: pass an integer, 1 or more.")

    def build_model(self) -> nn.Module:
        """Build the model in eval mode, with the same weights in every process."""
        _seed(self.seed)
        model = self.model_fn()
        if not isinstance(model, nn.Module):
            raise TPError(f"`verify`: `model_fn` returned a {type(model).__name__}, not a torch.nn.Module.")
        meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
        if meta is not None:
            raise TPError(
                f"`verify`: `{meta}` is on the meta device. Build a model with weights, such as a smaller one of the same kind."
            )
        return model.eval()

    def batch(self, step: int) -> Inputs:
        """Return the global batch of a step: what forward is called with."""
        _seed(self.seed + 1 + step)
        return as_inputs(self.inputs() if callable(self.inputs) else self.inputs)

    def micro_batch(self, batch: Inputs, dp_rank: int) -> Inputs:
        """Return the rows of one data-parallel rank: its part of every tensor whose dim 0 is that of the batch."""
        if self.dp == 1:
            return batch
        num_rows = next((len(t) for t in tensors_in(batch) if t.ndim), 0)
        if num_rows == 0 or num_rows % self.dp:
            raise TPError(
                f"`verify`: the inputs have {num_rows} rows (dim 0), which dp={self.dp} does not divide. Pass inputs with "
                f"{self.dp * max(1, num_rows)} rows."
            )
        rows = slice(dp_rank * num_rows // self.dp, (dp_rank + 1) * num_rows // self.dp)
        part: Inputs = map_tensors(lambda t: t[rows] if t.ndim and len(t) == num_rows else t, batch)
        return part


def as_inputs(inputs: Any) -> Inputs:
    """Return inputs as keyword arguments or as a tuple; a single value is a tuple of one."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def scalar_loss(model: nn.Module, inputs: Inputs, loss_fn: Callable[..., Tensor]) -> Tensor:
    """Run the model and return its loss: `loss_fn(output)`, or `loss_fn(output, inputs)` if it takes two arguments."""
    output = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    return loss_from(loss_fn, output, inputs)


def _seed(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


@dataclass
class Run:
    """What one process has seen; tensors are full, by the model's own names."""

    plan: CheckedPlan
    lr: float
    start: dict[str, Tensor]  # the state dict before the first step
    losses: list[float]  # of each step; on a rank, of its own micro-batch until they are averaged
    gradients: dict[str, Tensor]  # of the first step
    weights: dict[str, Tensor]  # the state dict after the last step


def train(model: nn.Module, task: Task, plan: CheckedPlan, lr: float | None, dp_ranks: range) -> Run:
    """Train for the steps of the task on the micro-batches of these data-parallel ranks (on a rank, its own), one after the other."""
    start, losses, gradients = full_state_dict(model), [], {}
    for step in range(task.steps):
        batch, total = task.batch(step), 0.0
        for dp_rank in dp_ranks:
            with sdpa_kernel(SDPBackend.MATH):
                loss = scalar_loss(model, task.micro_batch(batch, dp_rank), task.loss_fn) / len(dp_ranks)
                loss.backward()
            total += loss.item()
        losses.append(total)
        if step == 0:
            gradients = full_gradients(model)
        lr = default_lr(start, gradients) if lr is None else lr
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=lr)
        optimizer.step()
        optimizer.zero_grad()
    assert lr is not None
    return Run(plan, lr, start, losses, gradients, full_state_dict(model))


def default_lr(weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> float:
    """Return the learning rate with which the first step moves the weights by `FIRST_STEP` of their norm."""
    norm = _norm(list(gradients.values()))
    if not norm or not math.isfinite(norm):
        raise TPError(
            f"`verify`: the norm of all gradients is {norm} in a single process, so there is nothing to compare. Let `loss_fn` depend on "
            "the weights, and stay finite."
        )
    return FIRST_STEP * _norm([weights[name] for name in gradients]) / norm


def _norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


@torch.no_grad()
def perturb_constants(model: nn.Module) -> None:
    """Add noise, which depends on the name alone, to constant parameters (zero biases, norm weights of one), behind which mistakes hide."""
    for name, p in model.named_parameters():
        if p.is_floating_point() and p.numel() and bool((p == p.reshape(-1)[0]).all()):
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            p.add_((torch.randn(p.shape, generator=generator) * 0.1).to(p))
