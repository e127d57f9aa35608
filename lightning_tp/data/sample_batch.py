"""Take a small first batch from a loader, and run a LightningModule's step on it without logging: to infer a plan, or to estimate a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from lightning_tp.errors import TPError

SAMPLES = 2  # of a map-style dataset: a plan does not depend on the batch size
LOGGING = ("log", "log_dict", "print")


def first_of(loader: Any, *, whole: bool = False) -> Any:
    """Take a small first batch from a loader, or from each of several in a dict or list.

    Args:
        loader: or loaders.
        whole: with all its samples, those that a sampler names first.

    Raises:
        TPError: For data that can be read only once.

    Example:
        >>> first_of(DataLoader(range(100), batch_size=8))
        tensor([0, 1])
    """
    if isinstance(loader, dict):
        return {k: first_of(v, whole=whole) for k, v in loader.items()}
    if isinstance(loader, (list, tuple)) and any(isinstance(x, DataLoader) for x in loader):
        return type(loader)(first_of(x, whole=whole) for x in loader)
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        if whole and loader.batch_sampler is not None:
            return loader.collate_fn([loader.dataset[i] for i in next(iter(loader.batch_sampler))])
        if whole:
            return loader.collate_fn(loader.dataset[next(iter(loader.sampler))])
        count = min(loader.batch_size or SAMPLES, SAMPLES, len(loader.dataset))  # type: ignore[arg-type]
        samples = [loader.dataset[i] for i in range(count)]
        return loader.collate_fn(samples) if loader.batch_size is not None or loader.batch_sampler is not None else samples[0]
    if iter(loader) is loader:
        raise TPError(
            "There is no plan for this module, and none can be inferred from its first batch, since its data can be read only once. Set "
            "`example_input_array` on the module, or pass `TPStrategy(plan=..)`."
        )
    return next(iter(loader))


def silence_logging(module: Any) -> None:
    """Let `log`, `log_dict` and `print` of a LightningModule do nothing."""
    for name in LOGGING:
        module.__dict__[name] = _nothing


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


@contextmanager
def quiet(module: Any) -> Iterator[None]:
    """Silence a LightningModule while its step runs outside of a loop, and reset the torchmetrics that it has updated."""
    silence_logging(module)
    try:
        yield
    finally:
        for name in LOGGING:
            del module.__dict__[name]
        for m in module.modules():
            if hasattr(m, "update_called") and callable(getattr(m, "reset", None)):
                m.reset()
