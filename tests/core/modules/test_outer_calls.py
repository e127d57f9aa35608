"""Which modules code calls by themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_tp.core.modules.outer_calls import is_called, outer_calls, remember_called, remembered_calls


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(2, 4), nn.GELU(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda y: self.down(self.act(self.up(y))), x, use_reentrant=False)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Inner(), Inner()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 3:
            raise ValueError("too large")
        return self.second(self.first(x))

    def half(self, x: Tensor) -> Tensor:
        return self.first(x)


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.act = Outer(), nn.ReLU()

    def training_step(self, x: Tensor) -> Tensor:
        return self.act(self.net(x)).sum()


def test_only_calls_from_outside_of_others() -> None:
    step = Step()
    with outer_calls(step) as called:
        step.training_step(torch.ones(2, 2)).backward()  # blocks are computed again in it
    assert called == {"net"}
    with outer_calls(step) as called:
        step.net.half(torch.ones(2, 2))
        step.net.second.up(torch.ones(2, 2))
        step.act(torch.ones(2))
    assert called == {"net.first", "net.second.up"}
    with outer_calls(step) as called:
        with pytest.raises(ValueError, match="too large"):
            step.net(torch.ones(5, 2))
        step.net.first(torch.ones(2, 2))
    assert called == {"net", "net.first"}


def test_nothing_is_noted_afterwards() -> None:
    step = Step()
    with outer_calls(step) as called:
        pass
    step.net(torch.ones(2, 2))
    assert not called


def test_what_is_called_is_remembered() -> None:
    step = Step()
    assert remembered_calls(step) is None
    remember_called(step, {"net"})
    remember_called(step, {"net.first"})
    assert remembered_calls(step) == {"net", "net.first"}
    assert [is_called(m) for m in (step, step.net, step.act)] == [False, True, False]
