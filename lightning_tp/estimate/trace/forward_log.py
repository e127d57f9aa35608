"""In which order the modules of a model ran, and what crossed the ranks in between: the thread of the picture in `picture.py`."""

from __future__ import annotations

import weakref
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightning_tp.core.ops.split_logits import SplitLogits

Shape = tuple[int, ...]


class ForwardEvent(NamedTuple):
    """One thing that happened in the forward.

    Args:
        what: a module was called ("enter") or had ended ("leave"), a collective ("sent"), or kernels of a module ("op").
        module: whose name.
        name: of the collective ("all-gather"), or the kind of the kernel ("product", "attention", "other").
        shape: of the first floating-point tensor that came in or went out, on this rank; of a product, (batch, m, n, k); () if unknown.
        bytes: of a collective.
        tensor: a number of the tensor that came in; two modules with the same one read the same tensor. 0 if unknown.
    """

    what: Literal["enter", "leave", "sent", "op"]
    module: str
    name: str = ""
    shape: Shape = ()
    bytes: int = 0
    tensor: int = 0


class ForwardLog:
    """Writes the steps of one forward down."""

    def __init__(self) -> None:
        self.steps: list[ForwardEvent] = []
        self._tensors: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def enter(self, module: str, inputs: Any) -> None:
        """A module is called with these positional arguments."""
        x = _first(inputs)
        self.steps.append(ForwardEvent("enter", module, shape=_shape(x), tensor=0 if x is None else self._number(x)))

    def leave(self, module: str, output: Any) -> None:
        """It has ended, with this output (None if it raised)."""
        self.steps.append(ForwardEvent("leave", module, shape=_shape(_first(output))))

    def sent(self, module: str, kind: str, size: int) -> None:
        """A collective was called in it."""
        self.steps.append(ForwardEvent("sent", module, kind, bytes=size))

    def op(self, module: str, kind: str, shape: Shape) -> None:
        """A kernel ran in it; of several of a kind behind each other the first is kept."""
        last = self.steps[-1] if self.steps else None
        if last is None or (last.what, last.module, last.name) != ("op", module, kind):
            self.steps.append(ForwardEvent("op", module, kind, shape))

    def _number(self, x: Tensor) -> int:
        known = self._tensors.get(id(x))
        if known is None or known[0]() is not x:  # an id may be used again
            known = self._tensors[id(x)] = (weakref.ref(x), len(self.steps) + 1)
        return known[1]


def _first(values: Any) -> Tensor | None:
    with torch._C.DisableTorchFunction():
        return next((t for t in tree_flatten(values)[0] if isinstance(t, Tensor) and t.dtype.is_floating_point and t.ndim), None)


def _shape(x: Tensor | None) -> Shape:
    if x is None:
        return ()
    with torch._C.DisableTorchFunction():
        return tuple((x.local if isinstance(x, SplitLogits) else x).shape)
