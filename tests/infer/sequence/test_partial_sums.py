"""Which calls may run on partial sums, and what is one after them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_tp.infer.sequence.partial_sums import PartialSums, tensors_of


def followed(name: str, args: Any, kwargs: Any = None, *, first: bool = True, out: Any = None) -> tuple[bool, bool]:
    """Whether a call may run on a partial sum, its first or last argument, and whether what comes out is one."""
    sums, out = PartialSums(), torch.ones(2) if out is None else out
    sums.add(tensors_of(args)[0 if first else -1])
    runs = sums.follow(name, args, kwargs or {}, out)
    return runs, out in sums


def x() -> Tensor:
    return torch.ones(2)


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "linear"),
    [
        ("view", (x(), 2), {}, True),
        ("sum", (x(),), {}, True),
        ("tanh", (x(),), {}, False),
        ("add", (x(), x()), {}, False),  # of a full tensor, on every rank
        ("add", (x(), 1.0), {}, False),
        ("add", (x(), 0), {}, True),
        ("mul", (x(), x()), {}, True),
        ("mul", (x(), 3.0), {}, True),
        ("div", (x(), x()), {}, True),
        ("dropout", (x(), 0.1), {}, False),
        ("dropout", (x(), 0.0), {}, True),
        ("dropout", (x(),), {"p": 0.0}, True),
        ("dropout", (x(),), {}, False),  # 0.5
        ("index_add", (x(), 0, torch.tensor([1]), x()), {}, False),
        ("index_add", (x(), 0, torch.tensor([1])), {}, True),
        ("scatter_add", (x(), 0, torch.tensor([1])), {"reduce": "amax"}, False),
    ],
)
def test_what_is_linear_runs_on_partial_sums(name: str, args: Any, kwargs: Any, linear: bool) -> None:
    assert followed(name, args, kwargs) == (linear, linear)


def test_a_partial_sum_may_be_divided_and_not_divide() -> None:
    assert followed("div", (x(), x()), first=False) == (False, False)


def test_a_product_of_two_partial_sums_is_none() -> None:
    sums, a, b = PartialSums(), x(), x()
    sums.add(a, b)
    assert not sums.follow("mul", (a, b), {}, x())
    assert sums.follow("add", (a, b), {}, out := x()) and out in sums


def test_indices_that_come_out_are_no_partial_sums() -> None:
    assert followed("argmax", (x(),), out=torch.tensor([1])) == (True, False)


def test_partial_sums_are_added_to_zeros_in_place() -> None:
    sums, zeros, term = PartialSums(), torch.zeros(2), x()
    assert sums.follow("zeros", (2,), {}, zeros) and sums.follow("view", (zeros, 2), {}, flat := zeros.view(2))
    sums.add(term)
    assert sums.follow("index_add_", (flat, 0, torch.tensor([0]), term), {}, flat) and flat in sums
    sums, ones = PartialSums(), x()
    sums.add(term)
    assert not sums.follow("index_add_", (ones, 0, torch.tensor([0]), term), {}, ones) and ones not in sums


def test_what_is_reduced_is_no_partial_sum_any_more() -> None:
    sums, term = PartialSums(), x()
    sums.add(term)
    sums.remove(term)
    assert term not in sums and sums.follow("tanh", (term,), {}, x())


def test_tensors_in_containers_are_found() -> None:
    a, b, c = x(), x(), x()
    assert [id(t) for t in tensors_of((a, [b, (1, "no")], {"k": c}))] == [id(a), id(b), id(c)]
