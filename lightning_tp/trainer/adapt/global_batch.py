"""The same global batch on any number of ranks: what the data-parallel axis does not hold at once is accumulated.

A run that goes on with fewer nodes, or on another mesh, takes the same steps: `accumulate_grad_batches` follows from the batch size of the
training loader and the data-parallel size, when Lightning has the loader.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_tp._compat import patched
from lightning_tp.errors import TPError


def batches_to_accumulate(global_batch: int, batch_size: int, dp: int) -> int:
    """How many micro-batches a data-parallel rank adds up for one step.

    Args:
        global_batch: items of one optimizer step, over all ranks.
        batch_size: items of one batch of a data-parallel rank.
        dp: data-parallel ranks.

    Raises:
        TPError: if they don't make it up; it names the batch sizes that do.

    Example:
        >>> batches_to_accumulate(64, batch_size=4, dp=8)
        2
    """
    if global_batch % (batch_size * dp):
        fit = [n for n in range(1, global_batch // dp + 1) if global_batch % (n * dp) == 0]
        advice = f"use a batch size of {', '.join(map(str, fit))}" if fit else f"there are no batches for {dp} data-parallel ranks"
        raise TPError(
            f"`global_batch={global_batch}` is no multiple of {batch_size} items x {dp} data-parallel ranks: {advice}, or another global batch."
        )
    return global_batch // (batch_size * dp)


def keep_global_batch(
    trainer: pl.Trainer, global_batch: int, dp: int, expected: Callable[[], float | None] = lambda: None
) -> Callable[[], None]:
    """Let the Trainer accumulate what `global_batch` asks for, as soon as it has its training loader; returns what undoes it.

    `expected` says how many batches that must be, in an epoch that was begun on another mesh.
    """
    automatic = trainer.lightning_module.automatic_optimization
    if trainer.accumulate_grad_batches != 1 or any(_changes(c) for c in trainer.callbacks):  # type: ignore[attr-defined]
        raise TPError(
            "`TPStrategy(global_batch=..)` sets how many batches are accumulated: leave `accumulate_grad_batches` and "
            "`GradientAccumulationScheduler` out."
        )
    if not automatic:
        raise TPError(
            "`TPStrategy(global_batch=..)` is for automatic optimization: in manual optimization your own code accumulates."
        )
    loop: Any = trainer.fit_loop

    def setup_data() -> None:
        type(loop).setup_data(loop)
        if loop._combined_loader is not None:
            sizes = {_batch_size(loader) for loader in loop._combined_loader.flattened}
            if len(sizes) != 1 or None in sizes:
                raise TPError(
                    f"`TPStrategy(global_batch={global_batch})` needs one batch size, and the training loaders have "
                    f"{sorted(map(str, sizes))}. Set `Trainer(accumulate_grad_batches=..)` yourself."
                )
            found = batches_to_accumulate(global_batch, sizes.pop() or 1, dp)
            if (must := expected()) is not None and found != must:
                raise TPError(
                    f"The checkpoint is from the middle of an epoch, and {found} batches a step on this mesh are not what it had taken ({must:g} "
                    "would be): its place in the data is not known. Keep `global_batch` and the batch size, or resume from the end of an epoch."
                )
            trainer.accumulate_grad_batches = found

    undo = patched(loop, "setup_data", setup_data)

    def close() -> None:
        undo()
        trainer.accumulate_grad_batches = 1

    return close


def rescale(loaded: dict[str, Any], positions: list[dict[str, Any]], before: int, now: int) -> None:
    """Count what was read of an epoch in the batches of `now` data-parallel ranks, where `before` ranks have counted it; in place.

    What is under way stays so: a checkpoint that is made at the end of a batch has one batch more begun than completed, on any mesh.

    Raises:
        TPError: if it is no whole number of them.

    Example:
        >>> progress = {"total": {"ready": 11, "completed": 10}, "current": {"ready": 8, "completed": 7}}  # the epoch before had 3
        >>> rescale({"loops": {"fit_loop": {"epoch_loop.batch_progress": progress}}}, [], before=1, now=2)
        >>> progress
        {'total': {'ready': 5, 'completed': 4}, 'current': {'ready': 4, 'completed': 3}}
    """
    progress = loaded.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    current, total = progress.get("current", {}), progress.get("total", {})
    for of, name in [(current, "ready"), *((position, "read") for position in positions)]:
        if of.get(name, 0) * before % now:
            raise TPError(
                f"The checkpoint is from the middle of an epoch, after {of[name]} batches on each of {before} data-parallel ranks, which is no "
                f"whole number of batches on {now}. Resume from the end of an epoch, or on another mesh."
            )
    here = current.get("ready", 0) * before // now
    in_epochs_before = (total.get("ready", 0) - current.get("ready", 0)) * before // now
    for of, begun in ((total, in_epochs_before + here), (current, here)):
        more = begun - of.get("ready", 0)
        for name in of:
            of[name] += more
    for position in positions:
        position["read"] = position["read"] * before // now


def _changes(callback: Any) -> bool:
    return isinstance(callback, GradientAccumulationScheduler) and callback.going_to_accumulate_grad_batches()


def _batch_size(loader: Any) -> int | None:
    loader = getattr(loader, "loader", loader)  # of what a group shares
    size = getattr(loader, "batch_size", None)
    if size is None:
        size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) and size > 0 else None
