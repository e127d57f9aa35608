"""Start threads that work on the GPU of the thread that starts them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch


def start_thread(target: Callable[[], object], name: str, *, daemon: bool) -> threading.Thread:
    """Start a thread whose current device is that of the caller.

    A new thread has device 0 as its current one, on every rank: what it does for "the current device" (pinned memory, a barrier, a wait for a
    stream) would take memory for a context there, some 500 MB for each rank of a node.

    Example:
        >>> seen = []
        >>> start_thread(lambda: seen.append(threading.current_thread().name), "a thread", daemon=False).join()
        >>> seen
        ['a thread']
    """
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        if device is not None:
            torch.cuda.set_device(device)
        target()

    thread = threading.Thread(target=run, name=name, daemon=daemon)
    thread.start()
    return thread
