"""Throughput: exact numbers under a clock that the test moves, in a real Trainer. Two ranks: see test_shards.py."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader

from lightning_tp.callbacks import throughput
from lightning_tp.callbacks.throughput import Throughput, count_tokens
from lightning_tp.data.random_tokens import RandomTokens
from lightning_tp.errors import TPError
from lightning_tp.testing import fake_world

BATCH, LENGTH = 4, 8
NUM_PARAMETERS = 16 * 4 + 4 * 16 + 16


class FakeTime:
    """Seconds that pass only where the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Net(L.LightningModule):
    """A step takes 2 s, each of the first `num_slow` 50 s; a validation step takes 300 s."""

    def __init__(self, time: FakeTime, num_slow: int = 0) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Embedding(16, 4), nn.Linear(4, 16))
        self.time = time
        self.num_slow = num_slow
        self.num_steps = 0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.time.now += 50 if self.num_steps < self.num_slow else 2
        self.num_steps += 1
        return nn.functional.cross_entropy(self.model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.time.now += 300

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Seen(L.Callback):
    """What the progress bar would show after each step."""

    def __init__(self) -> None:
        self.rates: list[float | None] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        rate = trainer.progress_bar_metrics.get("tokens_per_s")
        self.rates.append(None if rate is None else float(rate))


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(throughput, "perf_counter", fake)
    return fake


def fit(net: L.LightningModule, *callbacks: L.Callback, trainer_class: Any = L.Trainer, **kwargs: Any) -> None:
    trainer = trainer_class(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **kwargs,
    )
    loader = DataLoader(RandomTokens(5 * BATCH, LENGTH, 16), batch_size=BATCH)
    trainer.fit(net, loader, DataLoader(RandomTokens(BATCH, LENGTH, 16), batch_size=BATCH))


def test_counts_steps_after_warmup_without_validation(time: FakeTime, capsys: pytest.CaptureFixture[str]) -> None:
    """Two epochs of 5 steps, 3 of them slow warmup; a sanity check, and validation (300 s) twice in each epoch."""
    callback = Throughput(warmup=3, peak_flops=1e6)
    fit(Net(time, num_slow=3), callback, max_epochs=2, val_check_interval=2)
    assert callback.speed == throughput.Speed(num_tokens=7 * BATCH * LENGTH, num_steps=7, seconds=14.0)
    assert callback.speed.tokens_per_s == 16.0
    assert callback.speed.ms_per_step == 2000.0
    flops = 6 * NUM_PARAMETERS * 16  # = 13824 FLOP/s
    line = f"Throughput: 16 tokens/s, 2000.0 ms/step over 7 steps, 0.0 MFLOP/s, MFU {100 * flops / 1e6:.1f}%"
    assert [x for x in capsys.readouterr().out.splitlines() if "Throughput" in x] == [line]


def test_mfu_in_the_progress_bar(time: FakeTime) -> None:
    class Bar(L.Callback):
        shown: float | None = None

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.shown = trainer.progress_bar_metrics.get("mfu")

    bar = Bar()
    fit(Net(time), Throughput(warmup=1, window=2, peak_flops=1e5), bar, max_steps=4)
    assert bar.shown == pytest.approx(6 * NUM_PARAMETERS * 16 / 1e5)
    fit(Net(time), Throughput(warmup=1, window=2), bar, max_steps=4)
    assert bar.shown is None


def test_no_warmup_counts_the_first_step(time: FakeTime) -> None:
    callback = Throughput(warmup=0)
    fit(Net(time, num_slow=1), callback, max_steps=4)
    assert callback.speed == throughput.Speed(num_tokens=4 * BATCH * LENGTH, num_steps=4, seconds=56.0)


def test_window_moves(time: FakeTime) -> None:
    """Steps of 50 s, then of 2 s: each window shows its own rate until the next one closes, in the next epoch too."""
    seen = Seen()
    fit(Net(time, num_slow=3), Throughput(warmup=1, window=2), seen, max_epochs=2, limit_val_batches=0)
    slow, fast = BATCH * LENGTH / 50, BATCH * LENGTH / 2
    assert seen.rates == pytest.approx([None, None, slow, slow, fast, fast, fast, fast, fast, fast])


def test_short_run_says_so(time: FakeTime, capsys: pytest.CaptureFixture[str]) -> None:
    callback = Throughput(warmup=3)
    fit(Net(time), callback, max_steps=3)
    assert callback.speed is None
    assert "not measured, all 3 steps were warmup (warmup=3)" in capsys.readouterr().out


def test_cuda_waits_at_borders_only(time: FakeTime, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 10 steps, the clock waits when it starts and stops (twice, for 2 epochs) and when a window closes."""
    waits: list[int] = []
    net = Net(time)
    clock = throughput._Clock
    monkeypatch.setattr(throughput, "_Clock", lambda device: clock(torch.device("cuda", 0)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(net.num_steps))
    fit(net, Throughput(warmup=1, window=4), max_epochs=2, limit_val_batches=0)
    assert waits == [1, 5, 5, 5, 9, 10]


def test_second_fit_starts_afresh(time: FakeTime) -> None:
    callback = Throughput(warmup=1)
    fit(Net(time, num_slow=1), callback, max_steps=5)
    fit(Net(time, num_slow=1), callback, max_steps=3)
    assert callback.speed == throughput.Speed(num_tokens=2 * BATCH * LENGTH, num_steps=2, seconds=4.0)


def test_module_may_say_its_flops(time: FakeTime, capsys: pytest.CaptureFixture[str]) -> None:
    net = Net(time)
    net.num_flops_per_token = 250_000_000  # type: ignore[assignment]
    fit(net, Throughput(warmup=1), max_steps=3)
    assert "4.0 GFLOP/s" in capsys.readouterr().out  # 16 tokens/s; no peak given, so no MFU


def test_tokens_fn_and_lightning_pytorch(time: FakeTime) -> None:
    import lightning.pytorch as pl

    callback = Throughput(tokens_fn=lambda batch: len(batch["tokens"]), warmup=1)
    fit(Net(time), callback, max_steps=3, trainer_class=pl.Trainer)
    assert callback.speed is not None
    assert callback.speed.num_tokens == 2 * BATCH


def test_finds_the_tokens() -> None:
    tokens = torch.zeros(2, 5, dtype=torch.int32)
    image, lengths, mask = torch.rand(2, 3, 4), torch.zeros(9, dtype=torch.int64), torch.zeros(7, 7, dtype=torch.bool)
    assert count_tokens(tokens) == 10
    assert count_tokens([image, mask, lengths, {"deep": (tokens, torch.zeros(3, 3).long())}]) == 10
    assert count_tokens(UserDict(input_ids=tokens)) == 10  # as transformers' BatchEncoding
    with pytest.raises(TPError, match=r"a list with torch.float32 \(2, 3, 4\), torch.int64 \(9,\)\).*tokens_fn"):
        count_tokens([image, lengths])


@pytest.mark.parametrize("wrong", [{"window": 0}, {"warmup": -1}, {"peak_flops": 0.0}])
def test_wrong_arguments_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(TPError, match=next(iter(wrong))):
        Throughput(**wrong)


def test_the_batches_of_a_step_are_counted_once_per_tensor_parallel_group() -> None:
    with fake_world(8):
        mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("data_parallel", "tensor_parallel"))
        # hybrid FSDP: every rank has its own data
        other = init_device_mesh("cpu", (2, 4), mesh_dim_names=("replicate", "shard"))
        found = []
        for known in ({"device_mesh": mesh}, {"device_mesh": other}, {}):
            trainer = SimpleNamespace(world_size=8, strategy=SimpleNamespace(root_device=torch.device("cpu"), **known))
            callback = Throughput()
            callback.on_train_start(trainer, None)  # type: ignore[arg-type]
            found.append(callback._dp)
        assert found == [2, 8, 8]
