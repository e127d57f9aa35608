from __future__ import annotations

import torch

from lightning_tp.estimate.trace.fusion import Fusion
from lightning_tp.estimate.trace.step_trace import FusedOp, Label
from lightning_tp.estimate.trace.storages import LiveStorages


def meta(numel: int) -> torch.Tensor:
    return torch.empty(numel, device="meta")


class Kernels:
    """Runs pointwise kernels from given tensors to new ones."""

    def __init__(self, *before: torch.Tensor) -> None:
        self.noted: list[FusedOp] = []
        self.storages = LiveStorages(lambda event: None, before)
        self.fusion = Fusion(self.storages, self.noted.append)

    def run(self, module: str, *inputs: torch.Tensor, numel: int) -> torch.Tensor:
        out = meta(numel)
        self.storages.add(out, Label(module, "activation"))
        self.fusion.add(module, "forward", inputs, [out])
        return out

    def flush(self) -> int:
        self.fusion.flush()
        return self.noted[-1].op.bytes


def test_what_lies_between_is_neither_read_nor_written() -> None:
    x = meta(10)
    kernels = Kernels(x)
    between = kernels.run("a", x, numel=10)
    out = kernels.run("b", between, x, numel=5)
    del between
    assert kernels.flush() == 4 * (10 + 5)  # x is read once
    (found,) = kernels.noted
    assert (found.op.module, found.op.phase, found.op.name) == ("a", "forward", "fused")
    del out


def test_what_is_needed_later_is_written() -> None:
    x = meta(10)
    kernels = Kernels(x)
    saved = kernels.run("a", x, numel=10)
    out = kernels.run("a", saved, numel=10)
    assert kernels.flush() == 4 * 30
    del out


def test_each_run_stands_alone() -> None:
    x = meta(10)
    kernels = Kernels(x)
    kernels.fusion.flush()
    assert not kernels.noted  # nothing has run
    first = kernels.run("a", x, numel=10)
    assert kernels.flush() == 4 * 20
    second = kernels.run("b", first, numel=10)  # it was written before, so it is read now
    assert kernels.flush() == 4 * 20 and [k.op.module for k in kernels.noted] == ["a", "b"]
    del second


def test_weights_that_are_written_count() -> None:
    weight = meta(6)
    kernels = Kernels(weight)
    kernels.fusion.add("norm", "backward", [], [weight])
    assert kernels.flush() == 24 and kernels.noted[0].op.phase == "backward"
