"""The view in which sharded tensors are seen now: local, as the plain tensors that they are, or full."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

from lightning_tp._compat import no_torch_function

F = TypeVar("F", bound=Callable[..., Any])
_classes: dict[type, Any] = {}  # of sharded tensors -> their `__torch_function__` in the full view


class _View:
    """Whether sharded tensors are seen as local ones now; may be nested, and is a decorator, too.

    `depth` is how many `local_view`s are around; 0: none, so they are seen in full but in a backward pass; -1: in full in any case.
    """

    depth = 0
    full_runs = 0  # of models that run as one process would

    def __init__(self, local: bool) -> None:
        self._local = local
        self._before: list[int] = []

    def __enter__(self) -> None:
        self._before.append(_View.depth)
        set_depth(max(_View.depth, 0) + 1 if self._local else -1)

    def __exit__(self, *_: object) -> None:
        set_depth(self._before.pop())

    def __call__(self, function: F) -> F:
        local = self._local

        @wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            before = _View.depth
            set_depth(max(before, 0) + 1 if local else -1)
            try:
                return function(*args, **kwargs)
            finally:
                set_depth(before)

        return inside  # type: ignore[return-value]


def follow_view(cls: type, seen_in_full: Any) -> None:
    """Let a class of tensors be a plain one in the local view, and have this `__torch_function__` outside of it."""
    _classes[cls] = seen_in_full
    type.__setattr__(cls, "__torch_function__", no_torch_function if _View.depth > 0 else seen_in_full)


def set_depth(depth: int) -> None:
    """Enter a view: the local one for a depth above 0. `torch_function` of a class is looked up at each call, so none is slower for it."""
    if (depth > 0) != (_View.depth > 0):
        for cls, seen_in_full in _classes.items():
            type.__setattr__(cls, "__torch_function__", no_torch_function if depth > 0 else seen_in_full)
    _View.depth = depth


def depth() -> int:
    """Return how many `local_view`s are around; 0 or less: sharded tensors are seen in full."""
    return _View.depth


def local_view() -> _View:
    """See sharded tensors as the plain local tensors that they are; a context manager, or a decorator.

    Example:
        >>> with local_view():
        ...     depth()
        1
    """
    return _View(True)


def full_view() -> _View:
    """See sharded tensors in full again, inside of `local_view`: for user code that is called from there."""
    return _View(False)


@contextmanager
def full_run() -> Iterator[None]:
    """Let the forward of models be no local view: sharded parameters are seen in full there, too."""
    _View.full_runs += 1
    try:
        yield
    finally:
        _View.full_runs -= 1


def full_runs() -> int:
    """Return how many `full_run`s are around."""
    return _View.full_runs
