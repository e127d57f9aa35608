"""Keep the global batch size on any number of ranks: accumulate the micro-batches that the data-parallel axis does not hold at once.

A run that is resumed with fewer nodes, or on another mesh, takes the same steps: `accumulate_grad_batches` follows from the batch size of
the training loader and the data-parallel size, once Lightning has the loader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_tp.errors import TPError
from lightning_tp.trainer.patches import private
from lightning_tp.trainer.patches.replaced import replaced


def batches_to_accumulate(global_batch: int, batch_size: int, dp: int) -> int:
    """Compute how many micro-batches a data-parallel rank accumulates for one step.

    Args:
        global_batch: Samples of one optimizer step, over all ranks.
        batch_size: Samples of one batch of a data-parallel rank.
        dp: Data-parallel ranks.

    Raises:
        TPError: If `batch_size * dp` does not divide `global_batch`; it names the batch sizes that do.

    Example:
        >>> batches_to_accumulate(64, batch_size=4, dp=8)
        2
    """
    if global_batch % (batch_size * dp):
        fit = [n for n in range(1, global_batch // dp + 1) if global_batch % (n * dp) == 0]
        advice = f"use a batch size of {', '.join(map(str, fit))}" if fit else f"no batch size fits {dp} data-parallel ranks"
        raise TPError(
            f"`global_batch={global_batch}` is not a multiple of a batch size of {batch_size} x {dp} data-parallel ranks: {advice}, or another "
            "global batch."
        )
    return global_batch // (batch_size * dp)


@contextmanager
def global_batch_kept(
    trainer: pl.Trainer, global_batch: int, dp: int, expected: Callable[[], float | None] = lambda: None
) -> Iterator[None]:
    """While a Trainer runs, let it accumulate what `global_batch` asks for, as soon as it has its training loader.

    Args:
        trainer: The Trainer.
        global_batch: Samples of one optimizer step, over all ranks.
        dp: Data-parallel ranks.
        expected: Returns how many batches that has to be, in an epoch that was begun on another mesh.

    Raises:
        TPError: If the Trainer accumulates by itself, or the module steps its optimizers; later, if the batch size does not fit.
    """
    if trainer.accumulate_grad_batches != 1 or any(_accumulates(c) for c in trainer.callbacks):  # type: ignore[attr-defined]
        raise TPError(
            "`TPStrategy(global_batch=..)` sets how many batches are accumulated: leave `accumulate_grad_batches` and "
            "`GradientAccumulationScheduler` out."
        )
    if not trainer.lightning_module.automatic_optimization:
        raise TPError(
            "`TPStrategy(global_batch=..)` is for automatic optimization: in manual optimization your own code accumulates."
        )
    loop: Any = trainer.fit_loop

    def setup(own: Callable[[], None]) -> Callable[[], None]:
        def setup_data() -> None:
            own()
            if loaders := private.loaders_of(loop):
                trainer.accumulate_grad_batches = _fitting(loaders, global_batch, dp, expected())

        return setup_data

    with replaced(loop, "setup_data", setup):
        try:
            yield
        finally:
            trainer.accumulate_grad_batches = 1


def _fitting(loaders: list[Any], global_batch: int, dp: int, expected: float | None) -> int:
    """The number of batches to accumulate from these loaders, checked against what a checkpoint expects."""
    sizes = {_batch_size(loader) for loader in loaders}
    if len(sizes) != 1 or None in sizes:
        raise TPError(
            f"`TPStrategy(global_batch={global_batch})` needs one batch size, and the training loaders have "
            f"{sorted(map(str, sizes))}. Set `Trainer(accumulate_grad_batches=..)` yourself."
        )
    found = batches_to_accumulate(global_batch, sizes.pop() or 1, dp)
    if expected is not None and found != expected:
        raise TPError(
            f"The checkpoint was saved in the middle of an epoch, and this mesh accumulates {found} batches per step where {expected:g} would "
            "continue the epoch: its position in the data is unknown. Keep `global_batch` and the batch size, or resume from the end of an epoch."
        )
    return found


def rescale(loaded: dict[str, Any], positions: list[dict[str, Any]], before: int, now: int) -> None:
    """Convert the progress of an epoch from batches of `before` data-parallel ranks to batches of `now` ranks, in place.

    A checkpoint that is saved at the end of a batch has one more batch begun than completed, on any mesh.

    Args:
        loaded: A checkpoint of a Trainer.
        positions: The positions of its training loaders.
        before: The data-parallel size of the run that saved it.
        now: The data-parallel size of this run.

    Raises:
        TPError: If it is not a whole number of batches.

    Example:
        >>> progress = {"total": {"ready": 11, "completed": 10}, "current": {"ready": 8, "completed": 7}}  # the epoch before had 3
        >>> rescale({"loops": {"fit_loop": {"epoch_loop.batch_progress": progress}}}, [], before=1, now=2)
        >>> progress
        {'total': {'ready': 5, 'completed': 4}, 'current': {'ready': 4, 'completed': 3}}
    """
    progress = loaded.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    current, total = progress.get("current", {}), progress.get("total", {})
    for counts, name in [(current, "ready"), *((position, "read") for position in positions)]:
        if counts.get(name, 0) * before % now:
            raise TPError(
                f"The checkpoint was saved in the middle of an epoch, after {counts[name]} batches on each of {before} data-parallel ranks, which "
                f"is not a whole number of batches on {now}. Resume from the end of an epoch, or on another mesh."
            )
    begun = current.get("ready", 0) * before // now
    in_epochs_before = (total.get("ready", 0) - current.get("ready", 0)) * before // now
    for counts, ready in ((total, in_epochs_before + begun), (current, begun)):
        more = ready - counts.get("ready", 0)
        for name in counts:
            counts[name] += more
    for position in positions:
        position["read"] = position["read"] * before // now


def _accumulates(callback: Any) -> bool:
    return isinstance(callback, GradientAccumulationScheduler) and callback.going_to_accumulate_grad_batches()


def _batch_size(loader: Any) -> int | None:
    loader = getattr(loader, "loader", loader)  # of one that a tensor-parallel group shares
    size = getattr(loader, "batch_size", None)
    if size is None:
        size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) and size > 0 else None
