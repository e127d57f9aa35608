"""Lightning's tuner: the search for a learning rate, by the loss of all ranks; and the one for a batch size, which is refused.

The latter would work as long as no rank runs out of memory, which is what it is for.
"""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_tp.errors import TPError
from lightning_tp.trainer.patches import REFUSAL


def check_callbacks(trainer: pl.Trainer) -> None:
    """The same for the `BatchSizeFinder` callback.

    Raises:
        TPError: if there is one.
    """
    if any(isinstance(c, pl.callbacks.BatchSizeFinder) for c in trainer.callbacks):  # type: ignore[attr-defined]
        raise TPError(f"`BatchSizeFinder` does not work under {type(trainer.strategy).__name__}. {REFUSAL}")
