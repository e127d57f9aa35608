"""Checkpoints of a strategy: written at once or in the background, found by a word, loaded from folders and files."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.trainer.states import TrainerFn

import lightning_tp as ltp
from lightning_tp.checkpoint import StoragePath
from lightning_tp.plan.plan import Plan
from lightning_tp.trainer.checkpoints import (
    CheckpointWriter,
    RequestedCheckpoint,
    content_of,
    load_full_weights,
    load_trainer_checkpoint,
    write_one_file,
)

PLACE = StoragePath("some.ckpt")


def fails() -> None:
    raise ltp.TPError("no space left")


# ------------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("background", [False, True])
def test_an_error_is_raised_where_it_is_waited_for(background: bool) -> None:
    writer = CheckpointWriter(background=background)
    if background:
        writer.write(PLACE, fails)
        with pytest.raises(ltp.TPError, match="no space left"):
            writer.finish()
    with pytest.raises(ltp.TPError, match="no space left"):
        writer.write(PLACE, fails, wait=True)
    assert writer.failed
    writer.write(PLACE, lambda: None, wait=True)
    assert not writer.failed
    writer.finish()


@pytest.mark.parametrize("background", [False, True])
def test_a_run_may_continue_without(background: bool) -> None:
    writer = CheckpointWriter(background=background, on_error="warn")
    with pytest.warns(UserWarning, match=r"no space left.*Training continues without it"):
        writer.write(PLACE, fails, wait=True)
    assert writer.failed


def test_after_a_failed_run_an_error_is_a_warning() -> None:
    writer = CheckpointWriter(background=True)
    writer.write(PLACE, fails)
    with pytest.warns(UserWarning, match="no space left"):
        writer.finish(only_warn=True)


def test_what_a_checkpoint_replaces_is_removed_after_it(tmp_path: Path) -> None:
    old = tmp_path / "old.ckpt"
    old.write_text("x")
    writer = CheckpointWriter(background=True)
    writer.write(PLACE, lambda: None if old.exists() else fails())
    writer.remove(StoragePath(str(old)))
    writer.finish()
    assert not old.exists() and not writer.failed
    old.write_text("x")
    failing = CheckpointWriter(background=False, on_error="warn")
    with pytest.warns(UserWarning):
        failing.write(PLACE, fails)
    failing.remove(StoragePath(str(old)))
    assert old.exists()


def test_a_snapshot_is_a_copy_in_the_background_only() -> None:
    weights = {"w": torch.ones(2)}
    assert CheckpointWriter(background=False).snapshot(weights) is weights
    copied = CheckpointWriter(background=True).snapshot(weights)
    weights["w"] += 1
    assert copied["w"].tolist() == [1, 1]


def test_what_is_sharded_and_what_is_not() -> None:
    checkpoint = {"state_dict": {"w": 1}, "optimizer_states": ["a", "b"], "global_step": 7, "epoch": 2, "callbacks": {"x": 1}}
    content = content_of(checkpoint, {"data_parallel": 1, "tensor_parallel": 2}, Plan({"a": "colwise"}), first_rank=True)
    assert content.sharded == {"state_dict": {"w": 1}, "optimizer_0": "a", "optimizer_1": "b"}
    assert (content.about.step, content.about.epoch, content.about.weights_only) == (7, 2, False)
    assert content.about.mesh["tensor_parallel"] == 2 and content.plan is not None and content.rest is not None
    other = content_of({"state_dict": {}}, {}, None, first_rank=False)
    assert other.about.weights_only and other.rest is None and other.plan is None and other.sharded == {"state_dict": {}}


def test_a_users_checkpoint_io_writes_files(tmp_path: Path) -> None:
    class Own(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            Path(path).write_text(f"{sorted(checkpoint)} {storage_options}")

    place = StoragePath(str(tmp_path / "a.ckpt"))
    write_one_file({"x": 1}, StoragePath(place.url, {"k": 1}), Own())
    assert Path(place.path).read_text() == "['x'] {'k': 1}"
    write_one_file({"x": 1}, place, TorchCheckpointIO())
    assert torch.load(place.path) == {"x": 1}


# ------------------------------------------------------------------------------------------------------------------- finding


def trainer_of(folder: Path, fn: TrainerFn = TrainerFn.FITTING) -> Any:
    keep = ModelCheckpoint(folder, save_last=True)
    trainer: Any = L.Trainer(accelerator="cpu", devices=1, logger=False, callbacks=[keep])
    trainer.state.fn = fn
    return trainer


@pytest.mark.parametrize(
    "asked, found, fn, word",
    [
        ("best", "a.ckpt", TrainerFn.FITTING, "best"),
        ("hpc", "a.ckpt", TrainerFn.FITTING, "hpc"),
        ("a.ckpt", "a.ckpt", TrainerFn.FITTING, None),
        (None, "a.ckpt", TrainerFn.FITTING, "last"),
        (None, "a.ckpt", TrainerFn.TESTING, "best"),
        (None, None, TrainerFn.TESTING, None),
    ],
)
def test_what_was_asked_for(asked: Any, found: Any, fn: TrainerFn, word: Any, tmp_path: Path) -> None:
    request = RequestedCheckpoint()
    assert request.find(trainer_of(tmp_path, fn), asked, found) == found and request.word == word


def test_the_last_one(tmp_path: Path) -> None:
    """Where Lightning finds none, what is there; where it finds one elsewhere, that."""
    request, trainer = RequestedCheckpoint(), trainer_of(tmp_path / "here")
    assert request.find(trainer, "last", None) is None and request.word == "last"
    assert request.find(trainer, "last", str(tmp_path / "elsewhere" / "last.ckpt")) == str(tmp_path / "elsewhere" / "last.ckpt")
    (tmp_path / "here").mkdir()
    for i, name in enumerate(("old", "new")):
        torch.save({}, tmp_path / "here" / f"{name}.ckpt")
        os.utime(tmp_path / "here" / f"{name}.ckpt", (i, i))
    assert request.find(trainer, "last", None).endswith("here/new.ckpt")


def test_a_damaged_one_is_replaced_only_if_it_was_asked_for_by_a_word(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    for name in ("a", "b"):
        torch.save({"state_dict": {}}, tmp_path / f"{name}.ckpt")
    (tmp_path / "b.ckpt").write_bytes((tmp_path / "b.ckpt").read_bytes()[:100])
    with pytest.raises(ltp.TPError, match="Nothing was loaded"):
        RequestedCheckpoint().select(trainer, str(tmp_path / "b.ckpt"))
    request = RequestedCheckpoint("last")
    with pytest.warns(UserWarning, match="`ckpt_path='last'`: "):
        place = request.select(trainer, str(tmp_path / "b.ckpt"))
    assert place.name == "a.ckpt" and trainer.ckpt_path == place.url and request.word is None


def test_the_next_best_one_comes_first(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    paths = {}
    for name, score in (("a", 1.0), ("b", 3.0), ("c", 2.0)):
        paths[name] = str(tmp_path / f"{name}.ckpt")
        torch.save({"state_dict": {}}, paths[name])
        trainer.checkpoint_callback.best_k_models[paths[name]] = torch.tensor(score)
    Path(paths["b"]).write_bytes(b"")
    trainer.checkpoint_callback.mode = "max"
    with pytest.warns(UserWarning):
        assert RequestedCheckpoint("best").select(trainer, paths["b"]).path == paths["c"]
    trainer.checkpoint_callback.mode = "min"
    with pytest.warns(UserWarning):
        assert RequestedCheckpoint("best").select(trainer, paths["b"]).path == paths["a"]


# ------------------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize(
    "loaded, strict, message",
    [
        ([1], True, "it contains a list"),
        ({"a": 1}, True, "it contains a dict without `state_dict`"),
        ({"state_dict": {}}, True, r"has no `layer.weight` and 1 more\. Set `strict_loading = False`"),
        ({"state_dict": {**BoringModel().state_dict(), "new": 1}}, True, "has `new`, which the model does not have"),
        ({"state_dict": {}}, False, None),
    ],
)
def test_weights_that_do_not_fit(loaded: Any, strict: bool, message: str | None) -> None:
    if message is None:
        load_full_weights(BoringModel(), loaded, PLACE, strict=strict)
        return
    with pytest.raises(ltp.TPError, match=message):
        load_full_weights(BoringModel(), loaded, PLACE, strict=strict)


def test_how_a_strategy_saves() -> None:
    """Tensor by tensor, unless somebody's code looks at the whole of it before."""

    class Looks(BoringModel):
        def on_save_checkpoint(self, checkpoint: Any) -> None:
            pass

    def saving(model: Any = None, io: Any = None, **options: Any) -> str:
        strategy = ltp.TPStrategy(tp=1, **options)
        strategy._lightning_module = model or BoringModel()
        strategy.checkpoint_io = io or TorchCheckpointIO()
        return strategy._saving

    file: Any = dict(save_distributed_checkpoint=False)
    assert (saving(), saving(Looks()), saving(**file)) == ("sharded", "sharded", "streamed")
    own = type("Own", (TorchCheckpointIO,), {})()
    for options in (dict(model=Looks()), dict(io=own), dict(async_checkpoint=True), dict(backend="dtensor")):
        assert saving(**options, **file) == "gathered", options  # type: ignore[arg-type]


def test_only_training_loads_optimizers(tmp_path: Path) -> None:
    """A validation after training still has optimizers, and may load weights alone."""
    module = BoringModel()
    place = StoragePath(str(tmp_path / "weights.ckpt"))
    torch.save({"state_dict": {k: v + 1 for k, v in module.state_dict().items()}}, place.path)
    strategy = SimpleNamespace(optimizers=[torch.optim.SGD(module.parameters(), lr=0.1)])
    trainer: Any = SimpleNamespace(lightning_module=module, strategy=strategy, callbacks=[])
    options: dict[str, Any] = {"safe_globals": [], "weights_only": None}
    before = module.layer.bias.clone()
    trainer.state = SimpleNamespace(fn=TrainerFn.VALIDATING)
    assert load_trainer_checkpoint(place, trainer, keep_weights=False, options=options) == {}
    assert torch.equal(module.layer.bias, before + 1)
    trainer.state = SimpleNamespace(fn=TrainerFn.FITTING)
    with pytest.raises(ltp.TPError, match=r"has 0 optimizer state\(s\) and the module 1 optimizer"):
        load_trainer_checkpoint(place, trainer, keep_weights=False, options=options)
