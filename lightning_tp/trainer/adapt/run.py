"""Adapt a Trainer, its callbacks and its metrics to a mesh for as long as it runs: all of it in one place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from lightning_tp.errors import raise_on_rank_zero
from lightning_tp.trainer.adapt.averaging import start_averages
from lightning_tp.trainer.adapt.global_batch import global_batch_kept
from lightning_tp.trainer.adapt.metrics import metrics_over_data_parallel
from lightning_tp.trainer.adapt.precision import MeshMixedPrecision
from lightning_tp.trainer.patches.run import lr_finder_by_mean_loss, users_sampler_kept


@contextmanager
def adapted_to_mesh(trainer: pl.Trainer, strategy: Any) -> Iterator[None]:
    """While a Trainer runs, let its metrics, averages, batch sizes, loaders and precision be right on the strategy's mesh.

    Args:
        trainer: Its callbacks have been set up.
        strategy: The Trainer's; its module is split.

    Raises:
        TPError: If `global_batch` does not go together with the Trainer's options.
    """
    mesh, module, fits = strategy.device_mesh, strategy.lightning_module, trainer.state.fn == TrainerFn.FITTING
    dp, _ = strategy.sizes
    with ExitStack() as stack:
        stack.enter_context(metrics_over_data_parallel(trainer, mesh, module))
        if fits:
            start_averages(trainer, module, full=not strategy.save_distributed_checkpoint)
            stack.enter_context(lr_finder_by_mean_loss(strategy.reduce))
        if fits and strategy.global_batch is not None:
            with raise_on_rank_zero(strategy.global_rank):
                stack.enter_context(global_batch_kept(trainer, strategy.global_batch, dp, lambda: strategy.resume.accumulate))
        if isinstance(strategy.precision_plugin, MeshMixedPrecision):
            strategy.precision_plugin.span(mesh.get_all_groups())
        if dp == 1:  # every rank reads all the data, and Lightning's sampler would shuffle
            stack.enter_context(users_sampler_kept(trainer))
        else:  # what FSDP2 all-gathers in inference mode can't be trained with afterwards
            for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
                loop.inference_mode = False
        yield
