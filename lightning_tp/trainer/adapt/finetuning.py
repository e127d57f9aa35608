"""Resume a run with Lightning's `BaseFinetuning`: weights that were unfrozen are unfrozen again, with their optimizer groups.

Such a callback freezes weights in `setup`, and adds groups to the optimizer when an epoch begins. Lightning gives a resumed run these groups in
`on_fit_start`, before a sharded checkpoint is read, and leaves their weights frozen (in one process as well). Here both are restored
before the optimizer's state is loaded into them.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning

TRAINABLE = "lightning_tp_trainable"  # in a checkpoint: the names of the parameters that required gradients


def note_trainable(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Put the names of the parameters that require gradients into a checkpoint, if a callback changes which ones do."""
    if _finetuning_callbacks(trainer):
        checkpoint[TRAINABLE] = [name for name, p in trainer.lightning_module.named_parameters() if p.requires_grad]


def restore_trainable(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Freeze and unfreeze parameters as they were when the checkpoint was written, and add the groups that the optimizers had.

    Args:
        trainer: Its optimizers are as `configure_optimizers` made them.
        checkpoint: The part of it that is not sharded.
    """
    states = [checkpoint.get("callbacks", {}).get(callback.state_key) for callback in _finetuning_callbacks(trainer)]
    if not any(states):
        return
    parameters = dict(trainer.lightning_module.named_parameters())
    added: set[str] = set()
    for state in states:
        for i, groups in ((state or {}).get("internal_optimizer_metadata") or {}).items():
            optimizer = trainer.optimizers[i]
            have = len(optimizer.param_groups)
            added |= {name for group in groups[have:] for name in group["params"]}
            for group in groups[have:]:
                optimizer.add_param_group({**group, "params": [parameters[name] for name in group["params"]]})
    trained = checkpoint.get(TRAINABLE)  # None: of a Trainer without this package
    for name, p in parameters.items():
        if trained is not None or name in added:
            p.requires_grad_(trained is None or name in trained)


def _finetuning_callbacks(trainer: pl.Trainer) -> list[BaseFinetuning]:
    return [callback for callback in trainer.callbacks if isinstance(callback, BaseFinetuning)]  # type: ignore[attr-defined]
