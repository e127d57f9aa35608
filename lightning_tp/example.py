"""What to run a LightningModule on to find its plan: its own example, or the first batch of its data, through its own step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, IterableDataset

from lightning_tp.choose import choose_plan
from lightning_tp.errors import TPError
from lightning_tp.plan import Plan
from lightning_tp.plan_check import any_split, splits_nothing

if TYPE_CHECKING:
    import lightning.pytorch as pl

ITEMS = 2  # of the first batch: a plan does not depend on how many there are
LOGS = ("log", "log_dict", "print")
STEPS = {"fit": "training_step", "validate": "validation_step", "test": "test_step", "predict": "predict_step"}


def find_plan(module: pl.LightningModule, trainer: pl.Trainer, tp: int) -> Plan:
    """The plan of a module that was given none: what the model inside declares, or what is inferred.

    To see that it runs, `choose_plan` runs `forward` on `example_input_array` if the module has one, else its step on the first batch.

    Raises:
        TPError: if there is nothing to run it on, it can't be run, or nothing in it can be split.
    """
    call, inputs = _what_to_run(module, trainer)
    with quiet(module):
        found = choose_plan(module, call, inputs, tp)
    if not any_split(found.check(module, tp).entries):
        raise TPError(splits_nothing(found, module, tp))
    return found


def _what_to_run(module: pl.LightningModule, trainer: pl.Trainer) -> tuple[Callable[[Any, Any], Any], Any]:
    """`(call, inputs)` so that `call(module, inputs)` runs it: its forward on its own example, or its step on the first batch."""
    example = module.example_input_array
    if example is not None:
        if isinstance(example, dict):
            return lambda m, x: m(**x), example
        return lambda m, x: m(*x), example if isinstance(example, tuple) else (example,)
    step = STEPS[str(trainer.state.fn.value) if trainer.state.fn is not None else "fit"]
    batch = tree_map_only(Tensor, lambda t: t.detach().cpu(), first_batch(trainer))
    return lambda m, x: getattr(m, step)(x, 0), batch


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


def made_quiet(module: Any) -> None:
    """Let what a module logs go nowhere."""
    for name in LOGS:
        module.__dict__[name] = _nothing


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


@contextmanager
def quiet(module: Any) -> Iterator[None]:
    """Steps log, and there is no loop yet that could take it."""
    made_quiet(module)
    try:
        yield
    finally:
        for name in LOGS:
            del module.__dict__[name]
        for m in module.modules():  # what torchmetrics has counted meanwhile
            if hasattr(m, "_update_count") and callable(getattr(m, "reset", None)):
                m.reset()
