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
    """A model to plan, estimate or verify."""

    build: Callable[[], nn.Module]  # builds the model anew
    model: nn.Module  # one such model, possibly on the meta device
    inputs: Inputs  # what its forward is called with
    loss_fn: Callable[..., Tensor]  # a scalar from its output, or from (output, inputs)
    plan: Any = None  # of the script's strategy or of the model, if there is one
    batch: int | None = None  # the batch size of the script's loader, if it is known


def plan_of_module(model: nn.Module) -> Any:
    """Return the attribute `plan` of a module, as a LightningModule may have it, if it can be one."""
    plan = getattr(model, "plan", None)
    return plan if isinstance(plan, (Plan, Mapping, str, Path)) else None
