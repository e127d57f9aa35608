"""`Throughput` prints what was predicted for a run beside what was measured."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_tp import RandomTokens, Throughput, TPStrategy
from lightning_tp.testing import run_ranks


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Net(L.LightningModule):
    def __init__(self, decides: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.decides = decides

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x = self.embed(batch["tokens"])
        for block in self.blocks:
            x = block(x)
        loss = nn.functional.cross_entropy(self.head(x).flatten(0, 1), batch["targets"].flatten())
        if self.decides and loss.detach() < 0:
            loss = -loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(decides: bool) -> tuple[int, int] | None:
    module, callback = Net(decides), Throughput(warmup=1)
    trainer = L.Trainer(
        accelerator="cpu", devices=4, strategy=TPStrategy(tp=2), callbacks=[callback], max_steps=3, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(RandomTokens(32, vocab_size=32, seq_len=8), batch_size=2))
    found = callback.predicted
    held = sum(p.to_local().numel() * 4 for p in module.parameters())  # type: ignore[operator]
    return (found.memory.parameters, held) if found is not None else None


@pytest.mark.parametrize("decides", [False, True])
def test_a_run_ends_with_its_prediction(decides: bool) -> None:
    ranks = run_ranks(fit, 4, decides, init=False, return_output=True)
    text = ranks[0][1]
    if decides:
        assert "predicted: not available (TPError" in text and "decides by the value" in text
        return
    assert "Throughput, predicted: parameters and optimizer" in text and "no times for this device" in text, text
    assert ranks[0][0] is not None and ranks[0][0][0] == ranks[0][0][1]
    assert "predicted" not in ranks[1][1]
