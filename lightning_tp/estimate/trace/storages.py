"""Follow the storages that a step makes, from the operator that makes each to its end: for live bytes, and for what fused kernels read and write."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_tp._compat import storage_key
from lightning_tp.estimate.trace.op_costs import bytes_of
from lightning_tp.estimate.trace.step_trace import Alloc, FusedOp, Label, Op, Phase


@dataclass
class _Live:
    label: Label
    bytes: int
    number: int
    finalizer: Any


class LiveStorages:
    """The storages that are alive, each counted once however many tensors view it.

    Args:
        note: called with each change of the live bytes.
        uncounted: tensors that were there before, such as parameters: neither they nor their views count.
    """

    def __init__(self, note: Callable[[Alloc], None], uncounted: Iterable[Tensor]) -> None:
        self.note = note
        self.uncounted = {storage_key(t) for t in uncounted}
        self._live: dict[int, _Live] = {}
        self._made = 0

    def add(self, tensor: Tensor, label: Label) -> bool:
        """Count a tensor's storage from now to its end; return False if it is known already."""
        storage, key = tensor.untyped_storage(), storage_key(tensor)
        if key in self.uncounted or key in self._live:
            return False
        finalizer = weakref.finalize(storage, self._end, key)
        finalizer.atexit = False
        self._made += 1
        self._live[key] = _Live(label, storage.nbytes(), self._made, finalizer)
        self.note(Alloc(label, storage.nbytes()))
        return True

    def relabel(self, tensor: Tensor, label: Label) -> None:
        """Count a storage as something else from now on, such as a gradient that has become a parameter's."""
        found = self._live.get(storage_key(tensor))
        if found is not None:
            self.note(Alloc(found.label, -found.bytes))
            self.note(Alloc(label, found.bytes))
            found.label = label

    def number(self, tensor: Tensor) -> int:
        """Return a number of a storage that is never used again: above 0 if the step has made it."""
        key = storage_key(tensor)
        found = self._live.get(key)
        return -key if found is None else found.number

    def outlive(self, numbers: Iterable[int]) -> list[int]:
        """Return those of these storages that are alive now."""
        live = {s.number for s in self._live.values()}
        return [n for n in numbers if n in live or -n in self.uncounted]

    def release(self) -> None:
        """Stop following: the step has ended."""
        for found in self._live.values():
            found.finalizer.detach()

    def _end(self, key: int) -> None:
        found = self._live.pop(key)
        self.note(Alloc(found.label, -found.bytes))


class Fusion:
    """Collects the kernels that a compiler would fuse, and notes the one that they become at `flush`: before a matmul or a collective.

    It reads what was there before it and writes what is still alive after it; what lies between stays in registers.
    """

    def __init__(self, storages: LiveStorages, note: Callable[[FusedOp], None]) -> None:
        self.storages = storages
        self.note = note
        self._read: dict[int, int] = {}  # number of a storage -> bytes
        self._written: dict[int, int] = {}
        self._place: tuple[str, Phase] = ("", "forward")

    def add(self, module: str, phase: Phase, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> None:
        """Fuse a kernel with those before it; it belongs to the module of the first."""
        if not self._written:
            self._place = module, phase
        for t in inputs:
            number = self.storages.number(t)
            if number not in self._written:
                self._read[number] = max(self._read.get(number, 0), bytes_of(t))
        for t in outputs:
            self._written[self.storages.number(t)] = bytes_of(t)

    def flush(self) -> None:
        """Note the kernel that those since the last flush become, if any."""
        if not self._written:
            return
        module, phase = self._place
        written = sum(self._written[number] for number in self.storages.outlive(self._written))
        size = sum(self._read.values()) + written
        self.note(FusedOp(Op("other", "fused", module, phase, 0, 0, size, (), torch.float32)))
        self._read.clear()
        self._written.clear()
