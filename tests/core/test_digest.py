"""Digests differ where a value, or the order of values, differs; the layout in memory does not matter."""

from __future__ import annotations

import itertools
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from lightning_tp.core import digest as module
from lightning_tp.core.digest import digest, value_digest

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.bool, torch.complex64]


def some(dtype: torch.dtype) -> Tensor:
    t = torch.arange(12).view(3, 4) * 37 % 11 - 3
    return (t > 0) if dtype == torch.bool else t.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_depends_on_values_and_not_on_the_layout(dtype: torch.dtype) -> None:
    t = some(dtype)
    twin = t.T.contiguous().T
    assert twin.stride() != t.stride() and torch.equal(digest(twin), digest(t))
    for index in (0, 5, 11):
        other = t.clone()
        other.view(-1)[index] = ~t.view(-1)[index] if dtype == torch.bool else t.view(-1)[index] + 1
        assert digest(other) != digest(t)
    assert digest(torch.empty(0, 3, dtype=dtype)) == 0
    assert not digest(torch.ones(3, requires_grad=True)).requires_grad


@pytest.mark.parametrize("dtype", DTYPES[:5])
def test_tells_every_order(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 2)  # several chunks
    orders = [torch.tensor(order).to(dtype) for order in itertools.permutations([1, 2, 3, 4, 5])]
    assert len({int(digest(t)) for t in orders}) == 120
    big = torch.arange(5000).to(torch.float32)
    assert len({int(digest(t)) for t in (big, big.flip(0), big.roll(1), big.view(2, -1).flip(0), big.view(50, 100).T)}) == 5


def test_a_view_at_an_odd_place_in_memory() -> None:
    t = torch.arange(40, dtype=torch.uint8)
    assert digest(t[3:20]) == digest(t[3:20].clone()) != digest(t[4:21])
    assert digest(torch.tensor(-0.0)) != digest(torch.tensor(0.0))  # bits and not values


DIFFERENT: list[tuple[Any, Any]] = [
    ("ab", "ba"), (1, 2), (1, 1.0), (True, 1), ("1", 1), (None, 0), (b"a", b"b"), ({1, 2}, {1, 3}), (object(), 3),
    (numpy.arange(3), numpy.arange(3)[::-1]), (numpy.zeros(2), numpy.zeros((2, 1))),
]  # fmt: skip


@pytest.mark.parametrize("pair", DIFFERENT, ids=range(len(DIFFERENT)))
def test_values_that_are_no_tensors(pair: tuple[Any, Any]) -> None:
    a, b = map(value_digest, pair)
    assert a != b and a == value_digest(pair[0])
    assert value_digest(object()) == value_digest(object())
    assert value_digest({"x", "y", "z"}) == value_digest({"z", "y", "x"})
