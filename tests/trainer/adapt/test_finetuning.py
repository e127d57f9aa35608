"""What a finetuning callback has unfrozen is unfrozen again, with its optimizer groups; with a Trainer it runs in scenarios/test_finetune.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import nn

from lightning_tp.trainer.adapt.finetuning import TRAINABLE, note_trainable, restore_trainable


def trainer_of(finetunes: bool = True) -> Any:
    """The second layer is frozen, and not in the optimizer."""
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    module[1].requires_grad_(False)
    optimizer = torch.optim.SGD(module[0].parameters(), lr=0.1)
    callbacks = [BackboneFinetuning()] if finetunes else [ModelCheckpoint()]
    return SimpleNamespace(lightning_module=module, optimizers=[optimizer], callbacks=callbacks)


def state_of(trainer: Any, *groups: dict[str, Any]) -> dict[str, Any]:
    key = trainer.callbacks[0].state_key
    return {"callbacks": {key: {"internal_optimizer_metadata": {0: [{"params": ["0.weight"], "lr": 0.1}, *groups]}}}}


def trained(trainer: Any) -> list[str]:
    return [name for name, p in trainer.lightning_module.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("finetunes", [True, False])
def test_names_are_noted_if_a_callback_changes_them(finetunes: bool) -> None:
    checkpoint: dict[str, Any] = {}
    note_trainable(trainer_of(finetunes), checkpoint)
    assert checkpoint == ({TRAINABLE: ["0.weight"]} if finetunes else {})


@pytest.mark.parametrize("noted", [None, ["1.weight"]])
def test_groups_and_weights_are_restored(noted: Any) -> None:
    """A checkpoint of a Trainer without this package has no names: then what is in a group that was added is trained."""
    trainer = trainer_of()
    checkpoint = state_of(trainer, {"params": ["1.weight"], "lr": 0.01})
    restore_trainable(trainer, checkpoint if noted is None else {**checkpoint, TRAINABLE: noted})
    first, second = trainer.optimizers[0].param_groups
    assert second["lr"] == 0.01 and second["params"][0] is trainer.lightning_module[1].weight and len(first["params"]) == 1
    assert trained(trainer) == (["0.weight", "1.weight"] if noted is None else noted)


def test_without_a_state_nothing_changes() -> None:
    for trainer, checkpoint in ((trainer_of(), {}), (trainer_of(False), {"callbacks": {}, TRAINABLE: []})):
        restore_trainable(trainer, checkpoint)
        assert trained(trainer) == ["0.weight"] and len(trainer.optimizers[0].param_groups) == 1
