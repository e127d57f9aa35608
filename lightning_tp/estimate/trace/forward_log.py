"""Log the order in which the modules of a model run, and the kernels and collectives between: what the picture of a plan is drawn from."""

from __future__ import annotations

import weakref
from typing import Any, Literal, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightning_tp._compat import without_torch_function
from lightning_tp.core.ops.split_logits import SplitLogits

Shape = tuple[int, ...]


class ForwardEvent(NamedTuple):
    """One event of the forward."""

    # a module is called ("enter") or has returned ("leave"), a collective, or a kernel
    what: Literal["enter", "leave", "collective", "kernel"]
    module: str  # its name
    name: str = ""  # of the collective ("all-gather"), or the kind of the kernel ("product", "attention", "other")
    # of the first floating-point tensor that goes in or comes out, on this rank; of a product, (batch, m, n, k); () if unknown
    shape: Shape = ()
    bytes: int = 0  # of a collective
    tensor: int = 0  # a number of the tensor that goes in; modules with the same number read the same tensor. 0 if unknown.


class ForwardLog:
    """The events of one forward, in order."""

    def __init__(self) -> None:
        self.events: list[ForwardEvent] = []
        self._tensors: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def enter(self, module: str, inputs: Any) -> None:
        """Log that a module is called with these positional arguments."""
        x = _first_float(inputs)
        self.events.append(ForwardEvent("enter", module, shape=_local_shape(x), tensor=0 if x is None else self._number(x)))

    def leave(self, module: str, output: Any) -> None:
        """Log that a module has returned this (None if it raised)."""
        self.events.append(ForwardEvent("leave", module, shape=_local_shape(_first_float(output))))

    def collective(self, module: str, kind: str, size: int) -> None:
        """Log a collective of `size` bytes."""
        self.events.append(ForwardEvent("collective", module, kind, bytes=size))

    def kernel(self, module: str, kind: str, shape: Shape) -> None:
        """Log a kernel; of several of a kind in a row, the first."""
        last = self.events[-1] if self.events else None
        if last is None or (last.what, last.module, last.name) != ("kernel", module, kind):
            self.events.append(ForwardEvent("kernel", module, kind, shape))

    def _number(self, x: Tensor) -> int:
        known = self._tensors.get(id(x))
        if known is None or known[0]() is not x:  # an id may be used again
            known = self._tensors[id(x)] = (weakref.ref(x), len(self.events) + 1)
        return known[1]


def _first_float(values: Any) -> Tensor | None:
    with without_torch_function():
        return next((t for t in tree_flatten(values)[0] if isinstance(t, Tensor) and t.dtype.is_floating_point and t.ndim), None)


def _local_shape(x: Tensor | None) -> Shape:
    if x is None:
        return ()
    with without_torch_function():
        return tuple((x.local if isinstance(x, SplitLogits) else x).shape)
