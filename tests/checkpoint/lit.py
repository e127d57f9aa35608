"""LightningModules for the tests of checkpoints: the same batch for every rank and step, so that every mesh trains alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_tp as ltp
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp.testing import randomize_

CONFIG = dict(vocab_size=103, dim=64, num_layers=2, num_heads=8, num_kv_heads=1, hidden_dim=90, bias=True)
QUIET: dict[str, Any] = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
TOKENS = torch.randint(0, 103, (4, 9), generator=torch.Generator().manual_seed(7))


class Lit(L.LightningModule):
    def __init__(self, seed: int = 0, tied: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = randomize_(Llama(LlamaConfig(**{**CONFIG, "tied": tied})), seed)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        tokens = TOKENS.to(self.device)
        return F.cross_entropy(self.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-3)


def loader() -> DataLoader[Any]:
    return DataLoader(torch.zeros(16, 1), batch_size=1)


def trainer(strategy: Any, devices: int, steps: int) -> L.Trainer:
    return L.Trainer(accelerator="cpu", devices=devices, strategy=strategy, max_steps=steps, **QUIET)


def ours(tp: int, **options: Any) -> ltp.TPStrategy:
    return ltp.TPStrategy(tp=tp, plan={f"model.{k}": v for k, v in PLAN.items()}, **options)


def train(
    tp: int, world: int, steps: int, *, resume: Any = None, save: Path | None = None, tied: bool = False, **options: Any
) -> dict[str, Tensor]:
    """Fit under `TPStrategy`, resuming from and saving to what is given; the whole weights."""
    t = trainer(ours(tp, **options), world, steps)
    module = Lit(seed=1 if resume is not None else 0, tied=tied)
    t.fit(module, loader(), ckpt_path=resume, weights_only=True if resume is not None else None)
    if save is not None:
        t.save_checkpoint(save)
    return ltp.full_state_dict(module)


def train_alone(steps: int, *, resume: Any = None, tied: bool = False) -> dict[str, Tensor]:
    """The same in a plain Trainer."""
    t = trainer("auto", 1, steps)
    module = Lit(seed=1 if resume is not None else 0, tied=tied)
    t.fit(module, loader(), ckpt_path=resume, weights_only=True if resume is not None else None)
    return {k: v.detach().cpu() for k, v in module.state_dict().items()}
