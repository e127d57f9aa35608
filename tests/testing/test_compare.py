"""`assert_trees_close` and `assert_parity`: what is equal passes, what differs is named, the worst first."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_tp.testing import assert_parity, assert_trees_close


def test_close_trees_return_the_largest_error() -> None:
    ref = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([4.0]), "empty": torch.empty(0), "int": torch.tensor([3])}
    got = {name: value.clone() for name, value in ref.items()}
    got["b"] += 4e-6
    error = assert_trees_close(got, ref)
    assert 0.9e-6 < error < 1.3e-6
    assert assert_trees_close({}, {}) == 0.0


def test_worst_names_come_first() -> None:
    ref = {name: torch.full((2,), 2.0) for name in "abc"}
    got = {"a": ref["a"] * 1.001, "b": ref["b"] * 2, "c": ref["c"] + torch.tensor([0.0, 0.1])}
    with pytest.raises(AssertionError) as info:
        assert_trees_close(got, ref, name="gradients")
    head, *lines = str(info.value).splitlines()
    assert head == "gradients: 3 of 3 differ by more than rtol=1e-05, the worst first"
    assert [line.split()[0] for line in lines] == ["b", "c", "a"]
    assert lines[0].endswith("got is 2 x ref") and "got is" not in lines[1]


def test_missing_extra_shapes_and_nan() -> None:
    ref = {"gone": torch.ones(1), "shape": torch.ones(2), "nan": torch.ones(2), "inf": torch.tensor([-torch.inf, 1.0])}
    got = {"new": torch.ones(1), "shape": torch.ones(3), "nan": torch.full((2,), torch.nan), "inf": ref["inf"]}
    with pytest.raises(AssertionError) as info:
        assert_trees_close(got, ref)
    text = str(info.value)
    assert "2 of 3 differ" in text
    assert "missing (only in ref): gone" in text and "extra (only in got): new" in text
    assert "shape (3,), but ref has (2,)" in text


def test_floor_forgives_noise_where_the_reference_is_zero() -> None:
    ref = {"weight": torch.ones(2), "key_bias": torch.zeros(2)}
    got = {"weight": torch.ones(2), "key_bias": torch.full((2,), 1e-8)}
    assert_trees_close(got, ref)
    with pytest.raises(AssertionError, match="key_bias"):
        assert_trees_close(got, ref, floor=0.0)


def test_parity_fails_with_the_report() -> None:
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x).relu()) * self.up.weight.shape[0]  # of a shard: half

    plan = {"up": "colwise", "down": "rowwise"}
    with pytest.raises(AssertionError, match="down"):
        assert_parity(Wrong, (torch.rand(2, 4, 8),), lambda y: y.square().mean(), tp=2, plan=plan, steps=1)
