"""Refuse the `BatchSizeFinder` callback, which would work only as long as no rank runs out of memory: which is what it is for.

`Tuner.scale_batch_size` is refused likewise (`patches/process.py`); `Tuner.lr_find` works (`patches/run.py`).
"""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_tp.errors import TPError
from lightning_tp.trainer.patches.process import NO_BATCH_SIZE_SEARCH


def refuse_batch_size_finder(trainer: pl.Trainer) -> None:
    """Refuse a Trainer with a `BatchSizeFinder` callback.

    Raises:
        TPError: It says what to do instead.
    """
    if any(isinstance(c, pl.callbacks.BatchSizeFinder) for c in trainer.callbacks):  # type: ignore[attr-defined]
        raise TPError(f"`BatchSizeFinder` does not work under {type(trainer.strategy).__name__}. {NO_BATCH_SIZE_SEARCH}")
