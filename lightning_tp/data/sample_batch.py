"""What to run a LightningModule on to find its plan: its own example, or the first batch of its data, through its own step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_tp.errors import TPError

if TYPE_CHECKING:
    import lightning.pytorch as pl

ITEMS = 2  # of the first batch: a plan does not depend on how many there are


LOGS = ("log", "log_dict", "print")


def first_batch(trainer: pl.Trainer) -> Any:
    """A small first batch of the data that the Trainer is about to use; nothing of it is used up, and no random number drawn.

    Raises:
        TPError: for data that can be read once only.
    """
    with torch.random.fork_rng([]):
        return first_of(data_of(trainer))


def data_of(trainer: pl.Trainer) -> Any:
    """The loader, or loaders, that the Trainer is about to use."""
    loop: Any = trainer._active_loop
    return loop._data_source.dataloader()


def first_of(loader: Any) -> Any:
    """A small first batch of a loader, or of each of several.

    Raises:
        TPError: as `first_batch`.
    """
    if isinstance(loader, dict):
        return {k: first_of(v) for k, v in loader.items()}
    if isinstance(loader, (list, tuple)) and any(isinstance(x, DataLoader) for x in loader):
        return type(loader)(first_of(x) for x in loader)
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        items = min(loader.batch_size or ITEMS, ITEMS, len(loader.dataset))  # type: ignore[arg-type]
        samples = [loader.dataset[i] for i in range(items)]
        return loader.collate_fn(samples) if loader.batch_size is not None or loader.batch_sampler is not None else samples[0]
    if iter(loader) is loader:
        raise TPError(
            "There is no plan for this module, and its data can be read only once, so that no batch can be looked at to find one. Set "
            "`example_input_array` on the module, or give a plan: `TPStrategy(plan=..)`."
        )
    return next(iter(loader))


def silence_logging(module: Any) -> None:
    """Let what a module logs go nowhere."""
    for name in LOGS:
        module.__dict__[name] = _nothing


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


@contextmanager
def quiet(module: Any) -> Iterator[None]:
    """Steps log, and there is no loop yet that could take it."""
    silence_logging(module)
    try:
        yield
    finally:
        for name in LOGS:
            del module.__dict__[name]
        for m in module.modules():  # what torchmetrics has counted meanwhile
            if hasattr(m, "_update_count") and callable(getattr(m, "reset", None)):
                m.reset()
