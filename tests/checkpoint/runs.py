"""A small run, for the tests of checkpoints under a Trainer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_tp as ltp
from lightning_tp.testing import randomize_

PLAN = {"*up": "colwise", "*down": "rowwise", "**": "replicate"}
QUIET = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)


@dataclass
class MyConfig:
    """A class of the user's, in hyperparameters."""

    width: int = 16


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(11, 16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.down(F.gelu(self.up(self.embed(tokens)))))


class Net(L.LightningModule):
    def __init__(self, seed: int = 0, **others: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = randomize_(Mlp(), seed)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def data() -> DataLoader:
    return DataLoader(ltp.RandomTokens(4, 8, 11), batch_size=2)


def trainer(*callbacks: Any, tp: int | None = None, strategy: dict[str, Any] | None = None, **options: Any) -> L.Trainer:
    world = int(os.environ.get("WORLD_SIZE", 1))
    how = ltp.TPStrategy(tp=tp or world, plan=PLAN, **(strategy or {}))
    options = {**QUIET, "max_epochs": 2, "enable_checkpointing": bool(callbacks), **options}
    return L.Trainer(accelerator="cpu", devices=world, strategy=how, callbacks=list(callbacks), **options)


def flip(file: Path) -> None:
    """One bit of the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
