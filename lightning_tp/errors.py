"""The one kind of error that a user can cause: says where, the numbers, and what to do."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

HEAD_START = 5.0  # seconds that rank 0 has to speak: a launcher (torchrun) stops all ranks as soon as one has ended


class TPError(ValueError):
    """A mistake in a plan, a mesh, a model or its data that the user can mend.

    The message names the place (a module, an argument), gives the numbers, and says what to do instead.

    Example:
        >>> raise TPError("`tp=3` does not divide a world of 4 ranks. Use tp=1, 2 or 4.")
        Traceback (most recent call last):
        ...
        lightning_tp.errors.TPError: `tp=3` does not divide a world of 4 ranks. Use tp=1, 2 or 4.
    """


class SecondaryError(TPError):
    """What a rank raises because another one has failed, which shows its own error: under a Trainer one line is said of it, no traceback."""


@contextmanager
def raise_on_rank_zero(rank: int, head_start: float | None = None) -> Iterator[None]:
    """Let an error that every rank meets at the same place be seen once: rank 0 raises it, the others leave with status 1.

    Args:
        rank: this one's.
        head_start: seconds until the others leave. Default: `HEAD_START`.

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
    """Let a launcher's SIGTERM end this process as it is; Lightning's handler would talk to ranks that are gone, and say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
