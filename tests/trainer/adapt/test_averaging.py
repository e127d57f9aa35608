"""Lightning's averages of weights on shards, against one process: while training, in checkpoints, and in a run that goes on."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler

import lightning_tp as ltp
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp import errors
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks

# one key/value head: in checkpoints of two ranks it lies in pieces
CONFIG = LlamaConfig(vocab_size=103, dim=32, num_layers=2, num_heads=4, num_kv_heads=1, hidden_dim=45, max_seq_len=32, bias=True)
QUIET = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
TP2, MESH_2X2 = (1, 2), (2, 2)


class Net(L.LightningModule):
    def __init__(self, seed: int = 0, schedule: bool = False) -> None:
        super().__init__()
        self.schedule = schedule
        self.model = randomize_(Llama(CONFIG), seed)
        self.register_buffer("seen", torch.zeros(()))
        self.val_losses: list[float] = []

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen += 1
        return self.loss(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def on_validation_end(self) -> None:
        self.val_losses.append(self.trainer.callback_metrics["val_loss"].item())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-3)
        if not self.schedule:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)]


class Mixed(ltp.TensorParallel, Net):
    plan = PLAN


class FromTheSecond(WeightAveraging):
    """As in Lightning's documentation."""

    def __init__(self, **options: Any) -> None:
        super().__init__(multi_avg_fn=get_ema_multi_avg_fn(0.5), **options)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and step_idx >= 1


CALLBACKS: dict[str, Callable[[], Any]] = {
    "mean": WeightAveraging,
    "ema": lambda: EMAWeightAveraging(decay=0.8, update_every_n_steps=2),
    "own": lambda: FromTheSecond(use_buffers=False, device="cpu"),
    "swa": lambda: StochasticWeightAveraging(swa_lrs=5e-3, swa_epoch_start=1, annealing_epochs=2),
}


def data(dp: int) -> DataLoader:
    dataset = ltp.RandomTokens(12, 12, 103, seed=0)
    sampler = None
    if dp > 1:
        tp = int(os.environ["WORLD_SIZE"]) // dp
        sampler = DistributedSampler(dataset, dp, int(os.environ["RANK"]) // tp, shuffle=False)
    return DataLoader(dataset, batch_size=4 // dp, sampler=sampler)


def trainer_of(mesh: tuple[int, int] | None, callbacks: list[Any], *, sharded: bool = True, **options: Any) -> L.Trainer:
    how: Any = ltp.TPStrategy(tp=mesh[1], plan=PLAN, save_distributed_checkpoint=sharded) if mesh else "auto"
    world = int(os.environ["WORLD_SIZE"])
    return L.Trainer(accelerator="cpu", devices=world, strategy=how, callbacks=callbacks, **{**QUIET, "max_epochs": 4, **options})


def weights(module: L.LightningModule, mesh: tuple[int, int] | None) -> dict[str, Tensor]:
    state = ltp.full_state_dict(module) if mesh else module.state_dict()
    return {k: v.clone() for k, v in state.items()}


def run(mesh: tuple[int, int] | None, folder: Path, sharded: bool = True) -> dict[str, Any]:
    """Each callback, uninterrupted and gone on with from the second epoch, with another start."""
    found: dict[str, Any] = {}
    dp = mesh[0] if mesh else 1
    for name, make in CALLBACKS.items():
        for kind in (Net, Mixed) if name == "mean" else (Net,):
            where = folder / f"{name}-{kind.__name__}"
            schedule = name == "swa"
            keep = ModelCheckpoint(where, filename="{epoch}", save_top_k=-1)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                trainer, module = trainer_of(mesh, [make(), keep], sharded=sharded), kind(schedule=schedule)
                trainer.fit(module, data(dp), data(dp))
            found[f"{name} {kind.__name__}"] = weights(module, mesh), module.val_losses, trainer.global_step
            trainer.validate(module, data(dp), verbose=False)
            found[f"{name} {kind.__name__} after"] = weights(module, mesh), module.val_losses, trainer.global_step
            own = [str(w.message) for w in caught if "WeightAveraging" in str(w.message) or "lightning_tp" in str(w.filename)]
            assert not own or mesh is None, own

            trainer, module = trainer_of(mesh, [make()], sharded=sharded, enable_checkpointing=False), kind(3, schedule)
            trainer.fit(module, data(dp), data(dp), ckpt_path=where / "epoch=1.ckpt")
            found[f"{name} {kind.__name__} resumed"] = weights(module, mesh), module.val_losses[1:], trainer.global_step

            module = kind(3)  # who has no such callback reads the average, where it was put in the model's place
            trainer = trainer_of(mesh, [], sharded=sharded, enable_checkpointing=False)
            trainer.validate(module, data(dp), ckpt_path=where / "epoch=2.ckpt", verbose=False)
            found[f"{name} {kind.__name__} read"] = weights(module, mesh), module.val_losses, 0
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("one")
    return run_ranks(lambda: run(None, folder), 1, init=False, timeout=200)[0], folder


def assert_same(ranks: list[dict[str, Any]], ref: dict[str, Any]) -> None:
    for found in ranks:
        assert list(found) == list(ref)
        for name, (whole, losses, steps) in ref.items():
            assert_trees_close(found[name][0], whole, rtol=1e-4, name=name)
            assert found[name][1:] == (pytest.approx(losses, rel=1e-5), steps), name


@pytest.mark.parametrize(
    "mesh, sharded",
    [
        pytest.param(TP2, True, id="tp2"),
        pytest.param(MESH_2X2, True, id="2x2", marks=pytest.mark.slow),
        pytest.param(MESH_2X2, False, id="2x2 files", marks=pytest.mark.slow),
    ],
)
def test_as_in_one_process(mesh: tuple[int, int], sharded: bool, reference: Any, tmp_path: Path) -> None:
    ref, _ = reference
    assert_same(run_ranks(lambda: run(mesh, tmp_path, sharded), mesh[0] * mesh[1], init=False, timeout=280), ref)
    for name in CALLBACKS:  # the test can fail: what is averaged differs from what is not, and a resumed run ends as the whole one
        assert not torch.equal(ref[f"{name} Net"][0]["model.norm.weight"], ref[f"{name} Net read"][0]["model.norm.weight"])
        assert_trees_close(ref[f"{name} Net resumed"][0], ref[f"{name} Net"][0], rtol=1e-5)


@pytest.mark.slow
def test_files_and_meshes_are_exchanged(reference: Any, tmp_path: Path) -> None:
    """What one process has averaged so far goes on in a split run; what 2 x 2 ranks have, on two and one."""
    ref, one = reference

    def go_on(mesh: tuple[int, int], where: Path, name: str) -> dict[str, Tensor]:
        trainer = trainer_of(mesh, [CALLBACKS[name]()], enable_checkpointing=False)
        trainer.fit(module := Net(3, name == "swa"), data(mesh[0]), data(mesh[0]), ckpt_path=where)
        return weights(module, mesh)

    def write() -> None:
        for name in ("ema", "swa"):
            keep = ModelCheckpoint(tmp_path / name, filename="{epoch}", save_top_k=-1)
            trainer_of(MESH_2X2, [CALLBACKS[name](), keep]).fit(Net(0, name == "swa"), data(2), data(2))

    def read() -> Any:
        found = {name: go_on(TP2, tmp_path / name / "epoch=1.ckpt", name) for name in ("ema", "swa")}
        return found, {name: go_on(TP2, one / f"{name}-Net" / "epoch=1.ckpt", name) for name in ("mean", "ema", "own")}

    run_ranks(write, 4, init=False, timeout=100)
    for some in run_ranks(read, 2, init=False, timeout=100):
        for found in some:
            for name, got in found.items():
                assert_trees_close(got, ref[f"{name} Net"][0], rtol=1e-4, name=name)


def test_nothing_stays_changed() -> None:
    """Not even after a run that fails; and what can't be averaged is said."""
    own = {kind: dict(vars(kind)) for kind in (WeightAveraging, StochasticWeightAveraging)}

    class Fails(Net):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            raise RuntimeError("on purpose")

    def body() -> str:
        errors.HEAD_START = 0.0
        for make in CALLBACKS.values():
            with pytest.raises(RuntimeError, match="on purpose"):
                trainer_of(TP2, [make()], enable_checkpointing=False).fit(Fails(), data(1))
            callback = make()
            trainer_of(TP2, [callback], enable_checkpointing=False, max_epochs=2).fit(Net(), data(1))
            if isinstance(callback, WeightAveraging):
                with pytest.raises(ltp.TPError, match="can't be called"):
                    callback._average_model(None)
        assert all(dict(vars(kind)) == before for kind, before in own.items())
        trainer = trainer_of(TP2, [WeightAveraging()], enable_checkpointing=False)
        trainer.strategy.backend = "dtensor"
        with pytest.raises((ltp.TPError, SystemExit)) as info:
            trainer.fit(Net(), data(1))
        return str(info.value)

    assert "`WeightAveraging` works with `backend='local'`" in run_ranks(body, 2, init=False, timeout=100)[0]
