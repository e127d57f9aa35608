from __future__ import annotations

import torch

from lightning_tp.estimate.options import Options


def test_names_for_reading() -> None:
    assert (Options().checkpointing_name, Options().optimizer_name) == ("none", "adamw")
    given = Options(optimizer=torch.optim.SGD, activation_checkpointing=lambda name, module: True)
    assert (given.checkpointing_name, given.optimizer_name) == ("by a function", "SGD")
    assert Options(activation_checkpointing="block").checkpointing_name == "block"
