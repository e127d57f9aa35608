"""Optimizers of a split model: which can't work on shards, and which give other steps there than in one process."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from lightning_tp.errors import TPError

OF_WHOLE_WEIGHTS = {  # optimizers that do not work element by element, and what they take of a weight
    "adafactor": "row and column statistics",
    "muon": "orthogonal directions",
    "lamb": "norms",
    "lars": "norms",
    "shampoo": "statistics",
    "soap": "statistics",
}


def check_optimizer(optimizer: Optimizer, dp: int, tp: int, *, collected: str, plain: bool = True) -> None:
    """Warn of an optimizer whose steps on shards are others than on whole weights.

    Args:
        optimizer: of a model that `parallelize` was applied to.
        dp: sizes of the mesh,
        tp: likewise.
        collected: where its parameters were collected, for the error.
        plain: the parameters are this package's shards (not those of `backend="dtensor"`).

    Raises:
        TPError: if it steps parameters that are not the model's, or can't step on shards.
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
            "LBFGS takes its steps from dot products over all parameters, and a rank would take them of its shards only: the ranks "
            f"would go different ways. It needs one process (here are {world}), or use another optimizer."
        )
    if isinstance(optimizer, torch.optim.Adafactor) and dp > 1:
        raise TPError(
            "torch's Adafactor can't step on FSDP2's shards (its in-place squares of partial norms), and "
            f"dp={dp}. Use tp={world}, or another optimizer."
        )
    if name.lower() in OF_WHOLE_WEIGHTS and tp > 1 and dist.get_rank() == 0:
        warnings.warn(
            f"{name} takes its {OF_WHOLE_WEIGHTS[name.lower()]} of each rank's shard of a split weight, not of the whole: its steps "
            "differ from those of one process.",
            stacklevel=2,
        )
