"""Check the optimizers of a split model: some can't step on shards, and some take other steps there than in one process."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch.optim import Optimizer

from lightning_tp.errors import TPError

NOT_ELEMENTWISE = {  # optimizers that look at a weight as a whole, and what they take of it
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

    Args:
        optimizer: Made from the parameters of a model that `parallelize` was applied to.
        dp: The size of the data-parallel axis.
        tp: The size of the tensor-parallel axis.
        collected: Where its parameters were collected, for the error.
        plain: The parameters are this package's shards (not those of `backend="dtensor"`).

    Raises:
        TPError: If it steps parameters that are not the model's, or can't step on shards.
    """
    name, world = type(optimizer).__name__, dp * tp
    strangers = [p for g in optimizer.param_groups for p in g["params"] if not hasattr(p, "_tp_shard")]
    if strangers and plain:
        raise TPError(
            f"{collected}: {len(strangers)} parameters of {name} are not the module's any more (the first has the shape "
            f"{tuple(strangers[0].shape)}): they were collected before the module was split. Collect them afterwards, from its `parameters()`."
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
