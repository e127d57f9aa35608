"""Every patch of lightning, in one list."""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path
from types import FunctionType
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.trainer import trainer as trainer_module
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.tuner import lr_finder, tuning
from lightning.pytorch.utilities import grads as lightning_grads
from lightning.pytorch.utilities.compile import to_uncompiled
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_tp._compat import backend_of_context
from lightning_tp.checkpoint.storage.layout import METADATA
from lightning_tp.checkpoint.weights.pretrained import load_from_checkpoint
from lightning_tp.errors import TPError, raise_on_rank_zero


def allow_folders(where: Any) -> None:
    """Let `MyModule.load_from_checkpoint(path)` take a checkpoint that is a folder, which Lightning refuses with `IsADirectoryError`; once.

    Args:
        where: Lightning's module in which LightningModule is.
    """
    own: Any = where._load_from_checkpoint
    if hasattr(own, "_lightning_tp"):
        return

    @functools.wraps(own)
    def load(
        cls: Any,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        options = {
            "map_location": map_location,
            "hparams_file": hparams_file,
            "strict": strict,
            "weights_only": weights_only,
            **kwargs,
        }
        if isinstance(checkpoint_path, (str, os.PathLike)) and (Path(checkpoint_path) / METADATA).is_file():
            return load_from_checkpoint(cls, Path(checkpoint_path), **options)
        return own(cls, checkpoint_path, **options)

    load._lightning_tp = True  # type: ignore[attr-defined]
    where._load_from_checkpoint = load


REFUSED_BY_LIGHTNING = ("16-mixed", "64-true")


def allow_all_precisions(strategy: type) -> None:
    """Let a Trainer with this strategy have the precisions that Lightning refuses for all strategies of its kind; once."""
    own = _AcceleratorConnector._validate_precision_choice
    if hasattr(own, "_lightning_tp"):
        return

    def validate(self: _AcceleratorConnector) -> None:
        if not (isinstance(self._strategy_flag, strategy) and self._precision_flag in REFUSED_BY_LIGHTNING):
            own(self)

    validate._lightning_tp = True  # type: ignore[attr-defined]
    _AcceleratorConnector._validate_precision_choice = validate  # type: ignore[method-assign]


def wrap_grad_norm() -> None:
    """Let `lightning.pytorch.utilities.grad_norm` take norms of whole gradients where it is given a split model; once.

    Its code is replaced and not its name: it works wherever and whenever it was imported.
    """
    function: Any = lightning_grads.grad_norm
    if hasattr(function, "_lightning_tp"):
        return
    function._lightning_tp = FunctionType(function.__code__, function.__globals__, "grad_norm", function.__defaults__)
    function.__code__ = _grad_norm.__code__


def _grad_norm(module: Any, norm_type: Any, group_separator: str = "/") -> Any:
    from lightning.pytorch.utilities.grads import grad_norm

    from lightning_tp.shards.grad_norm import grad_norms

    if any(hasattr(p, "_tp_shard") for p in module.parameters()):
        return grad_norms(module, norm_type, group_separator)
    return grad_norm._lightning_tp(module, norm_type, group_separator)  # type: ignore[attr-defined]


def allow_compiled(strategy: type) -> None:
    """Let a Trainer with this strategy have `torch.compile(LightningModule())`, which Lightning refuses: compiled block by block; once."""
    own: Any = trainer_module._verify_strategy_supports_compile
    if hasattr(own, "_lightning_tp"):
        return

    def verify(model: pl.LightningModule, of: Any) -> None:
        if isinstance(of, strategy) and model._compiler_ctx is not None:
            model.__dict__["_tp_compile"] = backend_of_context(model._compiler_ctx["dynamo_ctx"])
            to_uncompiled(model)
            rank_zero_warn(
                "The LightningModule was compiled as a whole, and a split model is compiled block by block: done so, as by `compile=True`."
            )
        own(model, of)

    verify._lightning_tp = True  # type: ignore[attr-defined]
    trainer_module._verify_strategy_supports_compile = verify  # type: ignore[assignment]


def follow_ckpt_path(strategy: type[Any]) -> None:
    """Let a strategy know how a Trainer was asked for a checkpoint (`"last"`, `weights_only=False`), which Lightning keeps to itself; once."""
    parse: Any = _CheckpointConnector._parse_ckpt_path
    run: Any = trainer_module.Trainer._run
    if hasattr(parse, "_lightning_tp"):
        return

    def parse_ckpt_path(self: Any, state_fn: TrainerFn, ckpt_path: Any, *args: Any, **kwargs: Any) -> Any:
        of = self.trainer.strategy
        if not isinstance(of, strategy):
            return parse(self, state_fn, ckpt_path, *args, **kwargs)
        with raise_on_rank_zero(of.global_rank):
            try:
                found = parse(self, state_fn, ckpt_path, *args, **kwargs)
            except (ValueError, FileNotFoundError) as error:  # no best one, no file of that name
                raise TPError(str(error)) from None
        return of.find_checkpoint(self.trainer, ckpt_path, found)

    def _run(self: Any, model: Any, ckpt_path: Any = None, weights_only: bool | None = None) -> Any:
        if isinstance(self.strategy, strategy):
            self.strategy._ckpt_weights_only = weights_only
        return run(self, model, ckpt_path=ckpt_path, weights_only=weights_only)

    parse_ckpt_path._lightning_tp = True  # type: ignore[attr-defined]
    _CheckpointConnector._parse_ckpt_path = parse_ckpt_path  # type: ignore[method-assign]
    trainer_module.Trainer._run = _run  # type: ignore[method-assign]


def filter_known_warnings() -> None:
    """Of warnings that come with every run, whatever the user does: one of torch about a line of Lightning's, on each rank; and one of
    Lightning's that evaluation may count items twice, which this strategy gives where it is so, with the numbers."""
    warnings.filterwarnings(
        "ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", module=r"lightning\.pytorch\.utilities\._pytree"
    )
    warnings.filterwarnings("ignore", "Using `DistributedSampler` with the dataloaders", PossibleUserWarning)


REFUSAL = (
    "It makes batches larger until memory runs out; a rank on which that happens leaves the others waiting in a collective. Start one short "
    "run for each size instead (`limit_train_batches=3, max_epochs=1`, and double the batch size until one fails)."
)


def refuse_batch_size_finder(strategy: type) -> None:
    """Let `Tuner(trainer).scale_batch_size` say so before any process is started; once."""
    own: Any = tuning._check_scale_batch_size_configuration
    if hasattr(own, "_lightning_tp"):
        return

    def check(trainer: pl.Trainer) -> None:
        if isinstance(trainer.strategy, strategy):
            raise TPError(f"`Tuner.scale_batch_size` does not work under {type(trainer.strategy).__name__}. {REFUSAL}")
        own(trainer)

    check._lightning_tp = True  # type: ignore[attr-defined]
    tuning._check_scale_batch_size_configuration = check


def find_lr_by_mean_loss(strategy: type) -> None:
    """Let `Tuner(trainer).lr_find` and `LearningRateFinder` look at the mean of the data-parallel ranks' losses; once.

    Lightning takes rank 0's.
    """
    own: Any = lr_finder._LRCallback.on_train_batch_end
    if hasattr(own, "_lightning_tp"):
        return

    def on_train_batch_end(self: Any, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *args: Any) -> None:
        if outputs and isinstance(trainer.strategy, strategy):
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs
            outputs = {"loss": trainer.strategy.reduce(loss.detach())}
        own(self, trainer, module, outputs, *args)

    on_train_batch_end._lightning_tp = True  # type: ignore[attr-defined]
    lr_finder._LRCallback.on_train_batch_end = on_train_batch_end  # type: ignore[method-assign, assignment]
