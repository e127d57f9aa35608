"""Check the optimizers of a split model: some can't step on shards, and some take other steps there than in one process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_tp.errors import TPError
from lightning_tp.shards.view import local_view
from lightning_tp.trainer.adapt.optimizer_probe import difference_on_halves


def unwrapped(optimizer: Any) -> Any:
    """The user's optimizer, if this is Lightning's wrapper around it."""
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def prepare_optimizers(optimizers: Iterable[Optimizer], dp: int, tp: int, *, collected: str, plain: bool = True) -> None:
    """Check optimizers as `check_optimizer` does, and let them zero gradients on shards."""
    for optimizer in optimizers:
        check_optimizer(optimizer, dp, tp, collected=collected, plain=plain)
        optimizer.zero_grad = local_view()(type(optimizer).zero_grad.__get__(optimizer))  # type: ignore[method-assign]


def check_optimizer(optimizer: Optimizer, dp: int, tp: int, *, collected: str, plain: bool = True) -> None:
    """Refuse an optimizer that can't step on shards, or takes other steps there than on full weights.

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
    if plain and tp > 1:
        _refuse_statistics(optimizer, tp)


def _refuse_statistics(optimizer: Optimizer, tp: int) -> None:
    """Try an optimizer on halves of a matrix, for each of its groups with split weights."""
    name = type(optimizer).__name__
    tried: set[Any] = set()
    for group in optimizer.param_groups:
        settings = repr([(k, v) for k, v in group.items() if isinstance(v, (bool, int, str))])  # rates and the like decide nothing
        for p in group["params"]:
            dim = getattr(getattr(p._tp_shard, "split", None), "dim", None)
            if dim is None or (key := (settings, min(dim, 1), p.ndim > 1)) in tried:
                continue
            tried.add(key)
            try:
                found = difference_on_halves(optimizer, p, min(dim, 1))
            except Exception as error:
                rank_zero_warn(
                    f"{name} could not be tried on a small matrix ({type(error).__name__}: {error}), so it is not known whether it takes the same "
                    f"steps on the shards of tp={tp} ranks as on full weights. Compare a few steps with one process."
                )
                return
            if found is not None:
                raise TPError(
                    f"{name} does not work element by element, so on the shards of tp={tp} ranks it would take other steps than on full weights, "
                    f"and the ranks would diverge: {found}. Use an optimizer that does (AdamW, SGD, Adagrad, Lion and the like), or give "
                    f"{name} only weights that are replicated (`replicate` in the plan; the first that is split is `{p._tp_shard.name}`)."
                )
