"""Stand in for a loader, and read it on behalf of other ranks: each batch becomes a message with the random numbers drawn for it.

Ranks of a tensor-parallel group share one random stream. Where the first of them reads for all, a dataset that draws random numbers would move
on the stream of that rank alone; so a message holds the random states that reading has changed, and those who receive it take them over.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_tp.core.ops.rng import local_state, local_state_restored, seed_torch, set_local_state
from lightning_tp.errors import SecondaryError


def has_state(loader: Any) -> bool:
    """Return whether a loader knows its position in a pass, as torchdata's `StatefulDataLoader` does."""
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


class LoaderProxy:
    """An object that passes for the loader it wraps, by its attributes and its class."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # while it is unpickled or copied
            raise AttributeError(name)
        return getattr(self.loader, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        found: type = self.loader.__class__
        return found


class Message(NamedTuple):
    """What the rank that reads tells the ranks that do not.

    "dropped" is the end because some data-parallel ranks have no batch; "dummy" is a batch to run a step on whose result is discarded.
    """

    kind: Literal["batch", "end", "dropped", "dummy", "error"]
    batch: Any = None  # the batch; the text of an error
    last: bool = False  # nothing follows, and nobody asks for more
    rng: dict[str, Any] | None = None  # the random states that reading has changed, as `local_state` names them
    error: Exception | None = None  # what reading raised; it stays on the rank that raised it

    def or_raise(self) -> Message:
        """Return the message, or raise the error that it reports: a `SecondaryError` on the ranks that do not read."""
        if self.kind == "error":
            raise self.error or SecondaryError(
                f"Reading data failed on the first rank of this tensor-parallel group: {self.batch}."
            )
        return self


class Reader:
    """Draw batches from a loader, and if asked to, keep track of the random numbers that this takes.

    `started` is an iterator of the loader and what was drawn from it already, for a stream that can be read only once.
    """

    def __init__(self, loader: Any, *, track: bool, started: tuple[Iterator[Any], list[Any]] | None = None) -> None:
        self.track = track
        self._before = local_state() if track else None  # making an iterator may draw random numbers, too
        self._iterator, self._drawn = (iter(loader), []) if started is None else started

    def read(self) -> Message:
        """Read the next batch; an error becomes a message, too, because the other ranks wait for one."""
        before = (self._before or local_state()) if self.track else {}
        self._before = None
        try:
            message = Message("batch", self._drawn.pop(0) if self._drawn else next(self._iterator))
        except StopIteration:
            message = Message("end")
        except Exception as error:
            message = Message("error", f"{type(error).__name__}: {error}", error=error)
        if not self.track:
            return message
        return message._replace(rng={k: v for k, v in local_state().items() if not _equal(v, before.get(k))})


def adopt_random_states(rng: dict[str, Any] | None) -> None:
    """Set the random states that a message carries; the others stay as they are."""
    if rng:
        set_local_state({**local_state(), **rng})


@contextmanager
def seeded_alike() -> Iterator[None]:
    """Draw the same random numbers on all ranks inside, whatever their states; afterwards the states are as before."""
    with local_state_restored():
        seed_torch(0)
        random.seed(0)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(0)
        yield


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, tuple) and any(isinstance(x, Tensor) for x in a):  # numpy's: (name, keys, position, ..)
        return isinstance(b, tuple) and len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)
