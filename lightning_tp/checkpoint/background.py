"""Save while training goes on: a step waits for a copy in host memory only, and a thread writes that.

The threads of the ranks talk over a process group of their own, so that their collectives never mix with those of training. There is one save
at a time: the next one waits for it, and so does the end of the run, and of Python.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_tp._compat import copy_dtensor, wait_for_gloo_at_exit
from lightning_tp.checkpoint.storage.nested import map_nested
from lightning_tp.core.threads import start_thread
from lightning_tp.errors import TPError

_group: tuple[Any, Any] = (None, None)  # a reference to the default group, the group made for it


def group_for_saving() -> dist.ProcessGroup | None:
    """Return the gloo group of all ranks for the saving threads, created once; None where there is no process group. A collective."""
    global _group
    if not dist.is_initialized():
        return None
    default = dist.group.WORLD
    if _group[0] is None or _group[0]() is not default:
        _group = (weakref.ref(default), dist.new_group(backend="gloo"))
        wait_for_gloo_at_exit()
    group: dist.ProcessGroup = _group[1]
    return group


class HostCopy:
    """Copies of tensors in host memory, in the same memory every time (pinned, where they come from a GPU)."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def copy(self, tree: Any) -> Any:
        """Return the same nesting of dicts, lists and tuples with copies of all tensors; valid until the next call."""
        copied = map_nested(self._copy, tree)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return copied

    def _copy(self, node: Any, path: tuple[Any, ...]) -> Any:
        where = "/".join(map(str, path))
        if isinstance(node, DTensor):
            return copy_dtensor(node.detach(), lambda t, name: self._copy_tensor(t, f"{where}#{name}"))  # type: ignore[arg-type]
        return self._copy_tensor(node, where) if isinstance(node, Tensor) else node

    def _copy_tensor(self, tensor: Tensor, where: str) -> Tensor:
        tensor = tensor.detach()
        buffer = self.buffers.get(where)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self.buffers[where] = buffer
        buffer.copy_(tensor, non_blocking=True)
        return buffer


class Background:
    """One piece of work at a time, in a thread that Python waits for before it ends."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._after: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._is_done = False
        self._name = ""

    def __reduce__(self) -> Any:
        """Pickle nothing of work that is under way: a spawned process begins with none."""
        return Background, ()

    @property
    def busy(self) -> bool:
        """Whether work was started for whose end nobody has waited yet."""
        return self._thread is not None

    def start(self, name: str, work: Callable[[], None]) -> None:
        """Start work; what came before has to be waited for. `name` is how errors call it: "Saving `last.ckpt`"."""
        assert self._thread is None
        self._name, self._error, self._after, self._is_done = name, None, [], False
        self._thread = start_thread(partial(self._run, work), "lightning_tp-checkpoint", daemon=False)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
            while True:
                with self._lock:
                    if not self._after:
                        self._is_done = True
                        return
                    then = self._after.pop(0)
                then()
        except Exception as error:
            self._error = error

    def after(self, then: Callable[[], None]) -> None:
        """Call `then` once the work that is under way has succeeded, and not at all if it fails; at once if there is none."""
        with self._lock:
            if self._thread is not None and not self._is_done:
                self._after.append(then)
                return
        if self._thread is None or self._error is None:
            then()

    def wait(self) -> None:
        """Wait until no work is under way; `TPError`, once, if it failed."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if isinstance(error, TPError):
            raise TPError(f"{error} (It was saved in the background.)") from error
        if error is not None:
            raise TPError(f"{self._name} failed in the background: {type(error).__name__}: {error}") from error
