"""The training loop of `verify`: a few steps of plain SGD, in a single process or on a rank, and what came of them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_tp.errors import TPError
from lightning_tp.plan.checked import CheckedPlan
from lightning_tp.shards.state_dict import full_gradients, full_state_dict
from lightning_tp.verify.task import Task, scalar_loss

FIRST_STEP = 1e-2  # how far the default learning rate moves the weights, relative to their norm


@dataclass
class Run:
    """What one process has seen: losses, and full tensors by the model's own names.

    Args:
        plan: The plan that was applied, or would be.
        lr: The learning rate of the steps.
        start: The state dict before the first step.
        losses: The loss of each step; on a rank, of its own micro-batch until they are averaged.
        gradients: Those of the first step.
        weights: The state dict after the last step.
    """

    plan: CheckedPlan
    lr: float
    start: dict[str, Tensor]
    losses: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def train(model: nn.Module, task: Task, plan: CheckedPlan, lr: float | None, dp_ranks: range) -> Run:
    """Train for the steps of the task on the micro-batches of these data-parallel ranks, one after the other.

    Args:
        model: The model, whole or sharded.
        task: What to train on.
        plan: Kept in the result.
        lr: The learning rate. Default: `default_lr` of the first gradients.
        dp_ranks: In a single process all of them, on a rank its own.
    """
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
    """Return the learning rate with which the first step moves the weights by `FIRST_STEP` of their norm.

    Raises:
        TPError: If the norm of all gradients is zero or not finite.
    """
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
    """Add a little noise to constant parameters (biases of zero, norm weights of one), behind which mistakes would hide.

    The noise depends on the name of a parameter alone.
    """
    for name, p in model.named_parameters():
        if p.is_floating_point() and p.numel() and bool((p == p.reshape(-1)[0]).all()):
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            p.add_((torch.randn(p.shape, generator=generator) * 0.1).to(p))
