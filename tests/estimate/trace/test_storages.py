from __future__ import annotations

import torch

from lightning_tp.estimate.trace.step_trace import Alloc, FusedOp, Label
from lightning_tp.estimate.trace.storages import Fusion, LiveStorages

X, GRADIENT = Label("x", "activation"), Label("w", "gradient")


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def test_a_storage_counts_once_and_until_its_last_view_is_gone() -> None:
    noted: list[Alloc] = []
    live = LiveStorages(noted.append, [])
    t = meta(4, 2)
    view = t[1:]
    assert live.add(t, X) and not live.add(view, X)
    del t
    assert noted == [Alloc(X, 32)]
    del view
    assert noted == [Alloc(X, 32), Alloc(X, -32)]


def test_what_was_there_before_does_not_count() -> None:
    noted: list[Alloc] = []
    weight = meta(4)
    live = LiveStorages(noted.append, [weight])
    assert not live.add(weight.view(2, 2), X)
    number = live.number(weight)
    assert number < 0 and live.outlive([number]) == [number] and not noted


def test_a_gradient_that_becomes_a_parameters() -> None:
    noted: list[Alloc] = []
    live = LiveStorages(noted.append, [])
    grad = meta(3)
    live.add(grad, X)
    live.relabel(grad, GRADIENT)
    live.relabel(meta(5), GRADIENT)  # one that is not followed
    del grad
    assert noted == [Alloc(X, 12), Alloc(X, -12), Alloc(GRADIENT, 12), Alloc(GRADIENT, -12)]


def test_numbers_are_not_used_again() -> None:
    live = LiveStorages(lambda event: None, [])
    seen = []
    for _ in range(5):  # of the same size: the address is likely the same
        t = meta(8)
        live.add(t, X)
        seen.append(live.number(t))
    assert len(set(seen)) == 5 and min(seen) > 0
    assert live.outlive(seen) == seen[-1:]


def test_nothing_is_noted_after_the_step() -> None:
    noted: list[Alloc] = []
    live = LiveStorages(noted.append, [])
    t = meta(8)
    live.add(t, X)
    live.release()
    del t
    assert noted == [Alloc(X, 32)]


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
