"""The one kind of error that a user can cause: says where, the numbers, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class TPError(ValueError):
    """A mistake in a plan, a mesh, a model or its data that the user can mend.

    The message names the place (a module, an argument), gives the numbers, and says what to do instead.

    Example:
        >>> raise TPError("`tp=3` does not divide a world of 4 ranks. Use tp=1, 2 or 4.")
        Traceback (most recent call last):
        ...
        lightning_tp.errors.TPError: `tp=3` does not divide a world of 4 ranks. Use tp=1, 2 or 4.
    """


@contextmanager
def on_one_screen(rank: int) -> Iterator[None]:
    """Let an error that every rank meets at the same place be seen once: rank 0 raises it, the others leave with status 1.

    Example:
        >>> with on_one_screen(rank=1):
        ...     raise TPError("the same on all ranks")
        Traceback (most recent call last):
        ...
        SystemExit: 1
    """
    try:
        yield
    except TPError:
        if rank == 0:
            raise
        raise SystemExit(1) from None
