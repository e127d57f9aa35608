"""Patches for one run of a Trainer: context managers that undo them at its end, and an attribute of the strategy."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.tuner import lr_finder
from lightning.pytorch.utilities import _pytree
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_tp.errors import TPError, raise_on_rank_zero
from lightning_tp.trainer.patches import private
from lightning_tp.trainer.patches.replaced import replaced


@contextmanager
def checkpoint_path_found_by(
    strategy: Any, trainer: pl.Trainer | None, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[None]:
    """Let a strategy see, and answer, with which `ckpt_path` and `weights_only` its Trainer was called. Lightning keeps both to itself.

    Args:
        strategy: Its `requested_checkpoint` gets both.
        trainer: None: nothing is changed.
        function: What the Trainer's launcher is about to call with `args` and `kwargs`: `Trainer._fit_impl` and the like.
        args: Likewise.
        kwargs: Likewise.
    """
    if trainer is None:
        yield
        return
    request, given = strategy.requested_checkpoint, inspect.signature(function).bind(*args, **kwargs).arguments
    request.weights_only = given.get("weights_only")

    def parse(own: Callable[..., Any]) -> Callable[..., Any]:
        def parse_ckpt_path(state_fn: Any, ckpt_path: Any, *args: Any, **kwargs: Any) -> Any:
            with raise_on_rank_zero(strategy.global_rank):
                try:
                    found = own(state_fn, ckpt_path, *args, **kwargs)
                except (ValueError, FileNotFoundError) as error:  # no best one, no file of that name
                    raise TPError(str(error)) from None
            return request.find(trainer, ckpt_path, found)

        return parse_ckpt_path

    with replaced(trainer._checkpoint_connector, "_parse_ckpt_path", parse):
        yield


@contextmanager
def users_sampler_kept(trainer: pl.Trainer) -> Iterator[None]:
    """Keep Lightning from putting a DistributedSampler, which shuffles, into the user's loaders."""
    with replaced(trainer._accelerator_connector, "use_distributed_sampler", lambda own: False):
        yield


@contextmanager
def lr_finder_by_mean_loss(reduce: Callable[[Any], Any]) -> Iterator[None]:
    """Let `lr_find` and `LearningRateFinder` look at the mean loss of the data-parallel ranks, by `reduce`; Lightning takes rank 0's."""

    def observe(own: Callable[..., None]) -> Callable[..., None]:
        def on_train_batch_end(self: Any, trainer: Any, pl_module: Any, outputs: Any, *args: Any, **kwargs: Any) -> None:
            if outputs:
                loss = outputs["loss"] if isinstance(outputs, dict) else outputs
                outputs = {"loss": reduce(loss.detach())}
            own(self, trainer, pl_module, outputs, *args, **kwargs)

        return on_train_batch_end

    with replaced(lr_finder._LRCallback, "on_train_batch_end", observe):
        yield


@contextmanager
def known_warnings_filtered() -> Iterator[None]:
    """Hide two warnings that every run gives, whatever the user does.

    One is torch's, about a line of Lightning's. The other says that evaluation may count items twice; `warn_of_repeated_items` says it where it
    is so, with the numbers.
    """
    before = list(warnings.filters)
    pattern = r"`isinstance\(treespec, LeafSpec\)` is deprecated"
    warnings.filterwarnings("ignore", pattern, module=re.escape(_pytree.__name__))
    warnings.filterwarnings("ignore", "Using `DistributedSampler` with the dataloaders", PossibleUserWarning)
    added = [entry for entry in warnings.filters if entry not in before]
    try:
        yield
    finally:
        for entry in added:
            with suppress(ValueError):
                warnings.filters.remove(entry)  # type: ignore[attr-defined]


class UncompiledModule:
    """`Strategy._lightning_module` as a descriptor: undo `torch.compile(LightningModule())`, which Lightning refuses a moment later.

    The backend is kept in the module's `_tp_compile`, for its blocks.
    """

    def __get__(self, strategy: Any, owner: type | None = None) -> Any:
        return None if strategy is None else strategy.__dict__.get("_lightning_module")

    def __set__(self, strategy: Any, module: pl.LightningModule | None) -> None:
        strategy.__dict__["_lightning_module"] = module
        backend = private.uncompile(module)
        if module is not None and backend is not None:
            module.__dict__["_tp_compile"] = backend
            rank_zero_warn(
                "The LightningModule was compiled as a whole. A split model is compiled block by block instead, as by `compile=True`."
            )
