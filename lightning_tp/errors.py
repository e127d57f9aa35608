"""Errors that a user can cause, and how they end processes: `TPError` says where, the numbers, and what to do; one rank shows it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

HEAD_START = 5.0  # seconds that rank 0 has to print its error: torchrun stops all ranks as soon as one has exited


class TPError(ValueError):
    """A mistake in a plan, a mesh, a model or its data that the user can fix.

    The message names the place (a module, an argument), gives the numbers, and says what to do instead.

    Example:
        >>> raise TPError("`tp=3` needs a multiple of 3 ranks, and the world size is 4. Use tp=1, 2, 4.")
        Traceback (most recent call last):
        ...
        lightning_tp.errors.TPError: `tp=3` needs a multiple of 3 ranks, and the world size is 4. Use tp=1, 2, 4.
    """


class SecondaryError(TPError):
    """The error of a rank on which nothing failed: another rank failed and shows why. Under a Trainer it is one line, without a traceback."""


@contextmanager
def raise_on_rank_zero(rank: int, head_start: float | None = None) -> Iterator[None]:
    """Show a `TPError` that every rank raises in this context once: rank 0 raises it, the others exit with status 1.

    Args:
        rank: this process's.
        head_start: seconds until the others exit. Default: `HEAD_START`.

    Example:
        >>> with raise_on_rank_zero(rank=1, head_start=0):
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
        with default_sigterm():
            time.sleep(HEAD_START if head_start is None else head_start)
        raise SystemExit(1) from None


@contextmanager
def default_sigterm() -> Iterator[None]:
    """Let a launcher's SIGTERM end this process without Lightning's handler, which would communicate with ranks that are gone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
