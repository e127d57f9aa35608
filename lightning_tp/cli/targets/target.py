"""`Target`: a model with its inputs and its loss, wherever they came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_tp.plan.plan import Plan
from lightning_tp.verify.training import Inputs


@dataclass(frozen=True)
class Target:
    """A model to plan, estimate or verify.

    Args:
        build: Builds the model anew.
        model: One such model, possibly on the meta device.
        inputs: What its forward is called with.
        loss_fn: A scalar from its output, or from (output, inputs).
        plan: The plan of the script's strategy or of the model, if there is one.
        batch: The batch size of the script's loader, if it is known.
    """

    build: Callable[[], nn.Module]
    model: nn.Module
    inputs: Inputs
    loss_fn: Callable[..., Tensor]
    plan: Any = None
    batch: int | None = None


def plan_of_module(model: nn.Module) -> Any:
    """Return the attribute `plan` of a module, as a LightningModule may have it, if it can be one."""
    plan = getattr(model, "plan", None)
    return plan if isinstance(plan, (Plan, Mapping, str, Path)) else None
