"""Lightning's tuner: the search for a learning rate, by the loss of all ranks; and the one for a batch size, which is refused.

The latter would work as long as no rank runs out of memory, which is what it is for.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.tuner import lr_finder, tuning

from lightning_tp.errors import TPError

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


def check_callbacks(trainer: pl.Trainer) -> None:
    """The same for the `BatchSizeFinder` callback.

    Raises:
        TPError: if there is one.
    """
    if any(isinstance(c, pl.callbacks.BatchSizeFinder) for c in trainer.callbacks):  # type: ignore[attr-defined]
        raise TPError(f"`BatchSizeFinder` does not work under {type(trainer.strategy).__name__}. {REFUSAL}")
