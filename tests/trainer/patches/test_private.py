"""The named accessors of what Lightning keeps private, on Lightning's own objects."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
    ModelSummary,
    StochasticWeightAveraging,
    ThroughputMonitor,
    WeightAveraging,
)
from lightning.pytorch.demos.boring_classes import BoringModel

import lightning_tp as ltp
from lightning_tp.trainer.patches import private

QUIET: dict[str, Any] = dict(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)


def test_strategies() -> None:
    strategy = ltp.TPStrategy(tp=2)
    assert not private.has_mesh(strategy)
    private.set_mesh(strategy, "mesh")  # type: ignore[arg-type]
    private.set_launcher(strategy, "launcher")
    assert (strategy.device_mesh, strategy.launcher, private.has_mesh(strategy)) == ("mesh", "launcher", True)
    private.set_sizes(strategy, 3, 4)
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (3, 4)
    fabric = ltp.FabricTPStrategy(tp=2)
    private.set_backward_sync_control(fabric, "control")  # type: ignore[arg-type]
    assert fabric._backward_sync_control == "control"


def test_a_call_through_forward_runs_its_hooks() -> None:
    class Net(BoringModel):
        def double(self, x: int) -> int:
            return 2 * x

    seen, net = [], Net()
    net.register_forward_hook(lambda module, args, out: seen.append(out))
    assert private.call_through_forward(ltp.TPStrategy(tp=1), net, "double", 4) == 8 and seen == [8]


def test_uncompile() -> None:
    model = BoringModel()
    assert private.uncompile(None) is None and private.uncompile(model) is None
    step = model.training_step
    compiled = L.pytorch.utilities.compile.from_compiled(torch.compile(model, backend="aot_eager"))
    assert compiled.training_step != step
    assert private.uncompile(compiled) is not None and model.training_step == step


def test_trainers_and_their_loaders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(BoringModel):
        seen: Any = None

        def on_train_batch_end(self, *args: Any) -> None:
            self.seen = (len(private.loaders_of(self.trainer.fit_loop)), private.num_prefetched(self.trainer))

    keep = ModelCheckpoint(tmp_path / "kept")
    trainer, net = L.Trainer(**{**QUIET, "enable_checkpointing": True}, callbacks=[keep], max_steps=1), Net()
    assert private.trainer_of(net) is None and private.trainer_of(None) is None
    assert private.loaders_of(trainer.fit_loop) == [] and private.num_prefetched(trainer) == 0
    trainer.fit(net)
    assert net.seen == (1, 0) and private.trainer_of(net) is trainer
    private.set_ckpt_path(trainer, "other.ckpt")
    assert trainer.ckpt_path == "other.ckpt" and not trainer._checkpoint_connector._user_managed
    assert private.checkpoint_folder(keep, trainer) == str(tmp_path / "kept")
    called = []
    predicting = L.Trainer(**QUIET)
    loaders = [torch.utils.data.DataLoader(torch.ones(2, 32)), torch.utils.data.DataLoader(torch.zeros(2, 32))]

    class Predicts(BoringModel):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
            called.append((batch_idx, dataloader_idx))

        def on_predict_end(self) -> None:
            private.predict_once_more(self.trainer, private.loaders_of(self.trainer.predict_loop)[1], torch.ones(1, 32), 7)

    predicting.predict(Predicts(), loaders)
    assert called == [(0, 0), (1, 0), (0, 1), (1, 1), (7, 1)]


def test_callbacks() -> None:
    monitor = ThroughputMonitor(len)
    assert private.throughputs_of(monitor) == {}
    assert private.summary_depth(ModelSummary(max_depth=3)) == 3
    options = private.average_options(WeightAveraging(use_buffers=False, avg_fn=max), torch.device("cpu"))
    assert options == {"device": torch.device("cpu"), "use_buffers": False, "avg_fn": max}
    assert private.average_options(WeightAveraging(device="meta"), torch.device("cpu"))["device"] == torch.device("meta")
    swa = StochasticWeightAveraging(0.1)
    private.set_average(swa, average := torch.nn.Linear(1, 1))
    assert swa._average_model is average


@pytest.mark.parametrize("loaded", [None, {"step": 1}])
def test_the_scheduler_of_swa(loaded: Any) -> None:
    cleared: list[Any] = []
    swa = StochasticWeightAveraging(0.1)
    swa._scheduler_state, swa._clear_schedulers = loaded, cleared.append  # type: ignore[method-assign, assignment]
    private.use_scheduler_of_swa(swa, "trainer")  # type: ignore[arg-type]
    assert cleared == (["trainer"] if loaded else [])


def test_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = L.Trainer(**QUIET)
    connector = private.signal_connector_of(trainer)
    assert connector is trainer._signal_connector and not trainer.received_sigterm
    private.set_received_sigterm(trainer)
    assert trainer.received_sigterm
    saved: list[Any] = []
    monkeypatch.setattr(type(connector), "_slurm_sigusr_handler_fn", lambda self, signum, _: saved.append((self, signum)))
    connector._slurm_sigusr_handler_fn = None  # what this package puts in its place, on the object
    private.save_and_requeue(trainer)
    assert saved == [(connector, signal.SIGUSR1)]
    monkeypatch.setattr(trainer, "_teardown", lambda: saved.append("torn down"))
    private.tear_down(trainer)
    assert saved[1:] == ["torn down"]
