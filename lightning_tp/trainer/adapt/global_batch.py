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
    """Compute how many batches of `batch_size` samples each of `dp` data-parallel ranks accumulates for a step of `global_batch` samples.

    `TPError` if `batch_size * dp` does not divide `global_batch`; it names the batch sizes that do.
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
def global_batch_kept(trainer: pl.Trainer, global_batch: int, dp: int, expected: Callable[[], float | None]) -> Iterator[None]:
    """While a Trainer runs, let it accumulate what `global_batch` asks for, as soon as it has its training loader.

    `expected` returns how many batches that has to be in an epoch that was begun on another mesh, or None.

    `TPError` if the Trainer accumulates by itself, or the module steps its optimizers; later, if the batch size does not fit.
    """
    schedulers = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    if trainer.accumulate_grad_batches != 1 or any(c.going_to_accumulate_grad_batches() for c in schedulers):
        raise TPError(
            "`TPStrategy(global_batch=..)` sets how many batches are accumulated: leave `accumulate_grad_batches` and "
            "`GradientAccumulationScheduler` out."
        )
    if not trainer.lightning_module.automatic_optimization:
        raise TPError(
            "`TPStrategy(global_batch=..)` is for automatic optimization: in manual optimization your own code accumulates."
        )
    loop: Any = trainer.fit_loop

    def setup_data(own: Callable[[], None]) -> None:
        own()
        if loaders := private.loaders_of(loop):
            trainer.accumulate_grad_batches = _fitting(loaders, global_batch, dp, expected())

    with replaced(loop, "setup_data", setup_data):
        try:
            yield
        finally:
            trainer.accumulate_grad_batches = 1


def _fitting(loaders: list[Any], global_batch: int, dp: int, expected: float | None) -> int:
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

    A checkpoint that is saved at the end of a batch has one more batch begun than completed, on any mesh. So {"ready": 8, "completed": 7} of
    one rank is {"ready": 4, "completed": 3} of two.

    `TPError` if it is not a whole number of batches.
    """
    progress = batch_progress(loaded)
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


def batch_progress(loaded: dict[str, Any]) -> dict[str, Any]:
    """The progress of the epoch in which a Trainer's checkpoint was saved, by batches: {"current": {"ready": 3, ..}, ..}; empty without one."""
    found: dict[str, Any] = loaded.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    return found


def _batch_size(loader: Any) -> int | None:
    loader = getattr(loader, "loader", loader)  # of one that a tensor-parallel group shares
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) and size > 0 else None
