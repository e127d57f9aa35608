"""Patches that stay until the process ends, since what they change is asked before a Trainer knows its strategy, or without one.

`load_folders` is in place once `lightning_tp` is imported; the others once a strategy of this package has been made. Trainers with another strategy,
and modules that are not split, get Lightning's own function from them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import lightning.pytorch as pl
from lightning.fabric import connector as fabric_connector
from lightning.pytorch.core import module as core_module
from lightning.pytorch.trainer.connectors import accelerator_connector
from lightning.pytorch.tuner import tuning
from lightning.pytorch.utilities import grads

from lightning_tp.checkpoint.weights.pretrained import load_from_checkpoint
from lightning_tp.checkpoint.weights.stored import METADATA
from lightning_tp.errors import TPError
from lightning_tp.trainer.patches.replaced import ORIGINAL, is_usable, patch_of, replace

REFUSED_BY_LIGHTNING = ("16-mixed", "64-true")
NO_BATCH_SIZE_SEARCH = (
    "It increases the batch size until memory runs out; the rank on which that happens leaves the others waiting in a collective. Start one short "
    "run for each size instead (`limit_train_batches=3, max_epochs=1`), and double the batch size until one fails."
)


def patch_for_trainers(strategy: type) -> None:
    """Let Trainers with this strategy, or a subclass, use what Lightning refuses for all strategies of its kind."""

    def validate(own: Callable[..., None]) -> Callable[..., None]:
        def validate_precision_choice(self: Any) -> None:
            if not (isinstance(self._strategy_flag, strategy) and self._precision_flag in REFUSED_BY_LIGHTNING):
                own(self)

        return validate_precision_choice

    def check(own: Callable[..., None]) -> Callable[..., None]:
        def check_scale_batch_size(trainer: pl.Trainer) -> None:
            if isinstance(trainer.strategy, strategy):
                name = type(trainer.strategy).__name__
                raise TPError(f"`Tuner.scale_batch_size` does not work under {name}. {NO_BATCH_SIZE_SEARCH}")
            own(trainer)

        return check_scale_batch_size

    replace(accelerator_connector._AcceleratorConnector, "_validate_precision_choice", validate)
    replace(tuning, "_check_scale_batch_size_configuration", check)
    take_norms_of_full_gradients()


def patch_for_fabrics(strategy: type) -> None:
    """Let Fabrics with this strategy, or a subclass, have the precisions that Lightning refuses for all strategies of its kind."""

    def check(own: Callable[..., Any]) -> Callable[..., Any]:
        def check_and_init_precision(self: Any) -> Any:
            if not (isinstance(self.strategy, strategy) and self._precision_input in REFUSED_BY_LIGHTNING):
                return own(self)
            mine, self.strategy = self.strategy, None  # it asks for the kind of strategy only
            try:
                return own(self)
            finally:
                self.strategy = mine

        return check_and_init_precision

    replace(fabric_connector._Connector, "_check_and_init_precision", check)
    take_norms_of_full_gradients()


def let_other_package_refuse(strategy: type) -> None:
    """Let the Trainer of `pytorch_lightning`, if it is there, take a strategy as far as the error that says which import is right."""
    if (other := sys.modules.get("pytorch_lightning.strategies")) is not None:
        other.Strategy.register(strategy)


def load_folders() -> None:
    """Let `MyModule.load_from_checkpoint(path)` read a sharded checkpoint, which is a folder."""

    def load(own: Callable[..., Any]) -> Callable[..., Any]:
        def load_file_or_folder(cls: Any, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(checkpoint_path, (str, os.PathLike)) or not (Path(checkpoint_path) / METADATA).is_file():
                return own(cls, checkpoint_path, *args, **kwargs)
            named = dict(zip(("map_location", "hparams_file", "strict", "weights_only"), args, strict=False))
            return load_from_checkpoint(cls, Path(checkpoint_path), **named, **kwargs)

        return load_file_or_folder

    replace(core_module, "_load_from_checkpoint", load)


def take_norms_of_full_gradients() -> None:
    """Let `lightning.pytorch.utilities.grad_norm` take norms of full gradients where it is given a split model.

    Its code is replaced, not its name, so that it works wherever and whenever it was imported.
    """
    function: Any = grads.grad_norm
    if hasattr(function, ORIGINAL) or not is_usable(patch_of(grads, "grad_norm")):
        return
    setattr(function, ORIGINAL, FunctionType(function.__code__, function.__globals__, "grad_norm", function.__defaults__))
    function.__code__ = _grad_norm.__code__


def _grad_norm(module: Any, norm_type: Any, group_separator: str = "/") -> Any:
    """Runs with the globals of Lightning's module: it imports what it needs."""
    from lightning.pytorch.utilities.grads import grad_norm

    from lightning_tp.shards.grad_norm import grad_norms

    if any(hasattr(p, "_tp_shard") for p in module.parameters()):
        return grad_norms(module, norm_type, group_separator)
    return grad_norm._tp_original(module, norm_type, group_separator)  # type: ignore[attr-defined]
