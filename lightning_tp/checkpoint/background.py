"""Saving beside training: the step waits for a copy in host memory only, and a thread writes that.

The thread of every rank talks to those of the others over a process group of its own, so that its collectives never mix with those of
training. There is one save at a time: the next one waits for it, and so does the end of the run, and of Python.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_tp._compat import copy_dtensor, wait_for_gloo_at_exit
from lightning_tp.errors import TPError

_group: tuple[Any, Any] = (None, None)  # a reference to the default group, the group made for it


def group_for_saving() -> dist.ProcessGroup | None:
    """A gloo group of all ranks for the threads alone, made once; None where there is no process group. A collective."""
    global _group
    if not dist.is_initialized():
        return None
    world = dist.group.WORLD
    if _group[0] is None or _group[0]() is not world:
        _group = (weakref.ref(world), dist.new_group(backend="gloo"))
        wait_for_gloo_at_exit()
    made: dist.ProcessGroup = _group[1]
    return made


class HostCopy:
    """Copies of tensors in host memory, in the same memory every time (pinned, where they come from a GPU)."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def of(self, tree: Any) -> Any:
        """The same nesting of dicts and lists, of copies; valid until this is asked for the next."""
        copied = self._copy(tree, "")
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return copied

    def _copy(self, value: Any, where: str) -> Any:
        if isinstance(value, DTensor):
            return copy_dtensor(value.detach(), lambda t, name: self._tensor(t, f"{where}#{name}"))  # type: ignore[arg-type]
        if isinstance(value, Tensor):
            return self._tensor(value, where)
        if isinstance(value, dict):
            return {k: self._copy(v, f"{where}/{k}") for k, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._copy(v, f"{where}/{i}") for i, v in enumerate(value))
        return value

    def _tensor(self, tensor: Tensor, where: str) -> Tensor:
        tensor = tensor.detach()
        buffer = self.buffers.get(where)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self.buffers[where] = buffer
        buffer.copy_(tensor, non_blocking=True)
        return buffer


class Background:
    """One piece of work at a time, in a thread that Python waits for before it ends.

    Example:
        >>> background, done = Background(), []
        >>> background.start("a save", lambda: done.append(1))
        >>> background.after(lambda: done.append(2))
        >>> background.wait()
        >>> done
        [1, 2]
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._after: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._what = ""

    def __getstate__(self) -> dict[str, Any]:
        """Of nothing that is under way: a spawned process begins anew."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    @property
    def busy(self) -> bool:
        """Whether something was begun whose end nobody has waited for."""
        return self._thread is not None

    def start(self, what: str, work: Callable[[], None]) -> None:
        """Begin; what came before has to be waited for."""
        assert self._thread is None
        self._what, self._error, self._after = what, None, []

        def run() -> None:
            try:
                work()
            except Exception as error:
                self._error = error
                return
            while True:
                with self._lock:
                    if not self._after:
                        self._done = True
                        return
                    then = self._after.pop(0)
                try:
                    then()
                except Exception as error:
                    self._error = error
                    return

        self._done = False
        self._thread = threading.Thread(target=run, name="lightning_tp-checkpoint", daemon=False)
        self._thread.start()

    def after(self, then: Callable[[], None]) -> None:
        """Do this once what is under way has gone well; not at all if it fails. At once if nothing is under way."""
        with self._lock:
            if self._thread is not None and not self._done:
                self._after.append(then)
                return
        if self._thread is None or self._error is None:
            then()

    def wait(self) -> None:
        """Until nothing is under way.

        Raises:
            TPError: if it failed, once.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if isinstance(error, TPError):
            raise TPError(f"{error} (It was saved in the background.)") from error
        if error is not None:
            raise TPError(f"{self._what} failed in the background: {type(error).__name__}: {error}") from error
