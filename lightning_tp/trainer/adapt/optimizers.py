"""Check the optimizers of a split model: some can't step on shards, and some take other steps there than in one process."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch.optim import Optimizer

from lightning_tp.errors import TPError

NOT_ELEMENTWISE = {  # optimizers that use statistics of a full weight, and which ones
    "adafactor": "row and column statistics",
    "muon": "orthogonal directions",
    "lamb": "norms",
    "lars": "norms",
    "shampoo": "statistics",
    "soap": "statistics",
}


def unwrapped(optimizer: Any) -> Any:
    """The user's optimizer, if this is Lightning's wrapper around it."""
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def check_optimizer(optimizer: Optimizer, dp: int, tp: int, *, collected: str, plain: bool = True) -> None:
    """Refuse an optimizer that can't step on shards, and warn of one that takes other steps there than on full weights.

    `TPError` also for parameters that are not the model's, where these are `plain` shards (not those of `backend="dtensor"`): it says
    where they were `collected`.
    """
    name, world = type(optimizer).__name__, dp * tp
    foreign = [p for g in optimizer.param_groups for p in g["params"] if not hasattr(p, "_tp_shard")]
    if foreign and plain:
        raise TPError(
            f"{collected}: {len(foreign)} parameters of {name} no longer belong to the module (the first has the shape "
            f"{tuple(foreign[0].shape)}): they were collected before the module was split. Collect them afterwards, from its `parameters()`."
        )
    if isinstance(optimizer, torch.optim.LBFGS) and world > 1:
        raise TPError(
            "LBFGS computes its steps from dot products over all parameters, and each rank would take them over its own shards only, so the "
            f"ranks would diverge. Use one process (this run has {world}), or another optimizer."
        )
    if isinstance(optimizer, torch.optim.Adafactor) and dp > 1:
        raise TPError(
            "torch's Adafactor can't step on FSDP2's shards (it squares partial norms in place), and "
            f"dp={dp}. Use tp={world}, or another optimizer."
        )
    if name.lower() in NOT_ELEMENTWISE and tp > 1 and dist.get_rank() == 0:
        warnings.warn(
            f"{name} takes {NOT_ELEMENTWISE[name.lower()]} of each rank's shard of a split weight, not of the full weight: its steps "
            "differ from those of one process.",
            stacklevel=2,
        )
