"""Tell which kernels a compiler would fuse: all that stand between two matmuls or collectives become one.

Such a kernel reads what was there before it and writes what is still alive after it; what lies between stays in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lightning_tp.estimate.trace.op_costs import bytes_of
from lightning_tp.estimate.trace.step_trace import FusedOp, Op, Phase
from lightning_tp.estimate.trace.storages import LiveStorages


class Fusion:
    """Collects kernels until `flush`, which notes the one that they become.

    Args:
        storages: tell which results are alive.
        note: called with each fused kernel.
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
