"""`randomize_`: the scale of each kind of parameter, and the same values for the same name and seed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_tp.errors import TPError
from lightning_tp.testing import assert_trees_close, randomize_


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(256, 512)
        self.embed = nn.Embedding(512, 256)
        self.norm = nn.LayerNorm(256)
        self.conv = nn.Conv2d(8, 512, 4)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.zeros(3))


def test_randomize_scales() -> None:
    net = randomize_(Net(), seed=3)
    assert net.head.weight is net.embed.weight
    assert net.embed.weight.std().item() == pytest.approx(0.3, rel=0.05)
    assert net.head.bias.std().item() == pytest.approx(0.1, rel=0.2)
    assert net.norm.weight.mean().item() == pytest.approx(1, rel=0.05)
    assert net.norm.weight.std().item() == pytest.approx(0.1, rel=0.2)
    assert net.conv.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert not net.steps.any()


def test_randomize_depends_on_seed_and_name_alone() -> None:
    one, two, other = randomize_(Net(), seed=3), randomize_(Net().double(), seed=3), randomize_(Net(), seed=4)
    assert_trees_close(two.state_dict(), one.state_dict(), rtol=0.0)
    with pytest.raises(AssertionError):
        assert_trees_close(other.state_dict(), one.state_dict())
    with pytest.raises(TPError, match=r"`weight` is on meta"):
        randomize_(nn.Linear(2, 2, device="meta"))
