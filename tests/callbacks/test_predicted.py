"""`Throughput` prints what was predicted for a run beside what was measured."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_tp import RandomTokens, Throughput, TPStrategy, estimate
from lightning_tp.callbacks.predicted import _maker, copy_on_meta, held_bytes, kept_batch, prediction_line
from lightning_tp.core.units import size
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
        assert "predicted: not available (TPError" in text and "reads the value of a tensor that depends on weights" in text
        return
    assert "Throughput, predicted: parameters and optimizer" in text and "no times for this device" in text, text
    assert ranks[0][0] is not None and ranks[0][0][0] == ranks[0][0][1]
    assert "predicted" not in ranks[1][1]


def test_a_copy_on_the_meta_device_shares_what_is_large() -> None:
    net = Net()
    net.register_buffer("table", torch.ones(3))
    net.embed.weight.requires_grad_(False)
    twin = copy_on_meta(net)
    assert all(p.is_meta for p in twin.parameters()) and not any(p.is_meta for p in net.parameters())
    assert not twin.embed.weight.requires_grad and twin.head.weight.requires_grad  # type: ignore[union-attr]
    assert twin.table is net.table and twin.blocks[0] is not net.blocks[0]  # type: ignore[union-attr, index]


def test_bytes_that_are_held() -> None:
    layer = nn.Linear(4, 4, bias=False)
    layer.register_parameter("twin", layer.weight)  # one storage
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert held_bytes(layer, [optimizer]) == 3 * 64  # the step counter is no tensor of the parameter's


@pytest.mark.parametrize("timed", [False, True])
def test_predicted_beside_measured(timed: bool) -> None:
    found = estimate(nn.Linear(8, 8), (torch.ones(2, 8),), (1, 1), loss_fn=lambda y: y.mean(), precision="32-true")
    held = found.memory.parameters + found.memory.optimizer
    text = prediction_line(found, timed, 10.0, 2048, 4096)
    assert f"parameters and optimizer {size(held)} (2.0 KiB measured)" in text
    assert f"peak memory {size(found.memory.peak.total)} (4.0 KiB measured), in the {found.memory.peak.name}" in text
    assert ("samples/s (10 measured) on NVIDIA H100" in text) == timed == ("no times for this device" not in text)
    assert "measured), in" not in prediction_line(found, timed, None, 2048, None)


def test_an_optimizer_of_the_same_settings() -> None:
    layer = nn.Linear(2, 2)
    made = _maker(torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9))(list(layer.parameters()))
    assert type(made) is torch.optim.SGD and made.defaults["lr"] == 0.5 and made.defaults["momentum"] == 0.9


def test_a_batch_is_kept_without_its_graph() -> None:
    x = torch.ones(2, requires_grad=True) * 2
    found = kept_batch({"x": x, "name": "n"})
    assert not found["x"].requires_grad and found["x"].tolist() == [2, 2] and found["name"] == "n"
