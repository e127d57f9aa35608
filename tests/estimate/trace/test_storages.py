from __future__ import annotations

import torch

from lightning_tp.estimate.trace.step_trace import Alloc, Label
from lightning_tp.estimate.trace.storages import LiveStorages

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
