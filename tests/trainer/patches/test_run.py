"""What is patched while a Trainer with `TPStrategy` runs is as it was afterwards, also after a failure; other Trainers see nothing of it."""

from __future__ import annotations

import inspect
import sys
import warnings
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelSummary, StochasticWeightAveraging, ThroughputMonitor
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.tuner import lr_finder

import lightning_tp as ltp
from lightning_tp.testing import run_ranks
from lightning_tp.trainer.checkpoints import RequestedCheckpoint
from lightning_tp.trainer.patches.run import (
    checkpoint_path_found_by,
    known_warnings_filtered,
    lr_finder_by_mean_loss,
    users_sampler_kept,
)
from lightning_tp.trainer.patches.table import PATCHES, Scope

QUIET: dict[str, Any] = dict(
    accelerator="cpu",
    devices=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    max_epochs=2,
    limit_train_batches=2,
)


def now() -> dict[str, Any]:
    """What is in the place of each target that is patched for a run; without the objects of a Trainer."""
    found: dict[str, Any] = {}
    for patch in PATCHES:
        module, _, path = patch.target.partition(":")
        if patch.scope in (Scope.RUN, Scope.OBJECT) and patch.signature is not None and module != "sys":
            owner: Any = import_module(module)
            for name in path.split("."):
                owner = inspect.getattr_static(owner, name)
            found[patch.target] = owner
    assert "lightning_tp" not in sys.excepthook.__module__
    return {**found, "filters": list(warnings.filters)}


def own_attributes(trainer: L.Trainer) -> dict[str, set[str]]:
    """The names that the objects of a Trainer have of their own."""
    objects = [trainer, trainer.fit_loop, trainer._checkpoint_connector, trainer._accelerator_connector, *trainer.callbacks]
    return {
        type(x).__name__: {name for name in vars(x) if callable(vars(x)[name])} - {"log", "log_dict", "_average_model"}
        for x in objects
    }


class Fits(BoringModel):
    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails, self.during = fails, {}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.during = now()
        if self.fails:
            raise ArithmeticError("on purpose")
        return super().training_step(batch, batch_idx)


def callbacks() -> list[L.Callback]:
    return [
        EMAWeightAveraging(decay=0.5),
        StochasticWeightAveraging(swa_lrs=0.1),
        ThroughputMonitor(lambda batch: len(batch)),
        ModelSummary(),
    ]


def test_all_is_undone_also_after_an_error() -> None:
    def body() -> None:
        before = now()
        for fails in (False, True):
            strategy = ltp.TPStrategy(tp=1, global_batch=4)
            trainer, model = L.Trainer(strategy=strategy, callbacks=callbacks(), **QUIET), Fits(fails)
            names = own_attributes(trainer)
            if fails:
                with pytest.raises(ArithmeticError, match="on purpose"):
                    trainer.fit(model, torch.utils.data.DataLoader(torch.ones(8, 32), batch_size=4))
            else:
                trainer.fit(model, torch.utils.data.DataLoader(torch.ones(8, 32), batch_size=4))
            changed = {name.rpartition(".")[2] for name, value in model.during.items() if value is not before.get(name)}
            averages = {
                "setup",
                "_swap_models",
                "_copy_average_to_current",
                "update_parameters",
                "transfer_weights",
                "load_state_dict",
            }
            assert changed >= averages | {"on_train_batch_end", "metric:gather_all_tensors", "log", "filters"}
            assert {k: v for k, v in now().items() if v is not before[k] and v != before[k]} == {}
            assert own_attributes(trainer) == names
            assert trainer._accelerator_connector.use_distributed_sampler and trainer.accumulate_grad_batches == 1

    run_ranks(body, 1, init=False)


def test_a_trainer_with_another_strategy_runs_the_originals() -> None:
    def body() -> None:
        before = now()
        ltp.TPStrategy(tp=1)
        model = Fits()
        L.Trainer(**QUIET).fit(model)
        assert {k for k, v in model.during.items() if v is not before[k] and k != "filters"} == set()

    run_ranks(body, 1, init=False)


def test_what_the_trainer_was_asked_for() -> None:
    """By position or by name; the answer is the strategy's; Lightning's errors come out as one TPError."""
    trainer = L.Trainer(**QUIET)
    strategy = SimpleNamespace(requested_checkpoint=RequestedCheckpoint(), global_rank=0)
    parse = trainer._checkpoint_connector._parse_ckpt_path
    asked = dict(model_provided=True, model_connected=True)
    fn = L.pytorch.trainer.states.TrainerFn.FITTING
    for args, kwargs in (((None, None, None, None, "x.ckpt", False), {}), ((None,), dict(ckpt_path="x.ckpt", weights_only=False))):
        with checkpoint_path_found_by(strategy, trainer, trainer._fit_impl, args, kwargs):
            assert strategy.requested_checkpoint.weights_only is False
            assert trainer._checkpoint_connector._parse_ckpt_path(fn, "x.ckpt", **asked) == "x.ckpt"
            assert strategy.requested_checkpoint.word is None
            with pytest.raises(ltp.TPError, match="`ModelCheckpoint` is not configured"):
                trainer._checkpoint_connector._parse_ckpt_path(fn, "best", **asked)
    assert trainer._checkpoint_connector._parse_ckpt_path == parse
    with checkpoint_path_found_by(strategy, None, print, (), {}):
        assert trainer._checkpoint_connector._parse_ckpt_path == parse


def test_a_learning_rate_is_found_by_the_mean() -> None:
    callback = lr_finder._LRCallback(3)
    trainer: Any = SimpleNamespace(
        fit_loop=SimpleNamespace(batch_idx=0), accumulate_grad_batches=1, global_step=0, should_stop=False,
        strategy=SimpleNamespace(broadcast=lambda x: x),
    )  # fmt: skip
    with lr_finder_by_mean_loss(lambda loss: loss + 10):
        callback.on_train_batch_end(trainer, None, {"loss": torch.tensor(1.0)}, None, 0)
        callback.on_train_batch_end(trainer, None, torch.tensor(2.0), None, 0)
        callback.on_train_batch_end(trainer, None, {}, None, 0)
    callback.on_train_batch_end(trainer, None, torch.tensor(3.0), None, 0)
    smoothed, b = [], 0.98
    average = 0.0
    for loss in (11.0, 12.0, None, 3.0):
        if loss is None:
            smoothed.append(None)
            continue
        average = b * average + (1 - b) * loss
        smoothed.append(average / (1 - b))
    got = [None if x != x else x for x in callback.losses]
    assert got == [pytest.approx(x) if x is not None else None for x in smoothed]


def test_the_users_sampler() -> None:
    trainer = L.Trainer(**QUIET)
    with users_sampler_kept(trainer):
        assert trainer._accelerator_connector.use_distributed_sampler is False
    assert trainer._accelerator_connector.use_distributed_sampler is True


def test_known_warnings() -> None:
    from lightning.fabric.utilities.warnings import PossibleUserWarning

    text = "Using `DistributedSampler` with the dataloaders. During `trainer.validate()`, .."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with known_warnings_filtered():
            warnings.warn(text, PossibleUserWarning, stacklevel=1)
            warnings.warn("another", PossibleUserWarning, stacklevel=1)
        warnings.warn(text, PossibleUserWarning, stacklevel=1)
    assert [str(w.message) for w in caught] == ["another", text]


def test_a_module_that_was_compiled_as_a_whole(tmp_path: Path) -> None:
    """It is uncompiled when the Trainer hands it over, and its backend kept; another one is left as it is."""
    strategy, model = ltp.TPStrategy(tp=1), BoringModel()
    compiled = L.pytorch.utilities.compile.from_compiled(torch.compile(model, backend="eager"))
    with pytest.warns(UserWarning, match="compiled block by block instead"):
        strategy._lightning_module = compiled
    assert strategy.lightning_module is model and model._compiler_ctx is None and model.__dict__["_tp_compile"] is not None
    plain = BoringModel()
    strategy._lightning_module = plain
    assert strategy.lightning_module is plain and "_tp_compile" not in plain.__dict__
    strategy._lightning_module = None
    assert strategy.lightning_module is None
