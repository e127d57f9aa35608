from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lightning_tp.infer.calls.local_sizes import (
    LocalShape,
    PerRankInt,
    fraction,
    local_of,
    mapped,
    on_rank,
    per_rank_ints,
    plain,
    whole_of,
)


@pytest.fixture(autouse=True)
def none_diverging() -> Iterator[None]:
    PerRankInt.diverging = set()
    yield
    PerRankInt.diverging = set()


def size(whole: int = 12, *local: int) -> Any:
    return PerRankInt.of(whole, local or (6, 6), frozenset({"here"}))


def pair(n: Any) -> tuple[int, tuple[int, ...]]:
    return whole_of(n), local_of(n, 2)


def test_a_size_is_followed_through_arithmetic() -> None:
    n = PerRankInt.of(12, (6, 6))
    assert (n // 3, (n // 3).local) == (4, (2, 2))
    assert (2 * n + 1).local == (13, 13)
    assert type(n - n) is int
    assert type(PerRankInt.of(4, (4, 4))) is int


@pytest.mark.parametrize(
    ("op", "other", "expected", "swapped"),
    [
        (operator.add, 5, (17, (12, 9)), (17, (12, 9))),
        (operator.mul, 2, (24, (14, 8)), (24, (14, 8))),
        (operator.sub, 2, (10, (5, 2)), (-10, (-5, -2))),
        (operator.floordiv, 5, (2, (1, 0)), (0, (0, 1))),
        (operator.mod, 5, (2, (2, 4)), (5, (5, 1))),
        (operator.mul, size(3, 2, 1), (36, (14, 4)), (36, (14, 4))),
    ],
)
def test_arithmetic_is_that_of_each_rank(op: Any, other: Any, expected: Any, swapped: Any) -> None:
    n = size(12, 7, 4)
    assert pair(op(n, other)) == expected
    assert pair(op(other, n)) == swapped
    assert not PerRankInt.diverging
    assert op(n, other).reads == {"here"}


def test_other_integer_operations() -> None:
    n = size(12, 7, 4)
    assert pair(-n) == (-12, (-7, -4))
    assert [pair(x) for x in divmod(n, 5)] == [(2, (1, 0)), (2, (2, 4))]
    assert [pair(x) for x in divmod(30, n)] == [(2, (4, 7)), (6, (2, 2))]
    assert pair(5 // size(2, 0, 1)) == (2, (0, 5))  # a rank without any
    assert not PerRankInt.diverging


@pytest.mark.parametrize(
    ("use", "value"),
    [
        (lambda n: n / 2, 6.0),
        (lambda n: 6 / n, 0.5),
        (lambda n: n**2, 144),
        (lambda n: 2**n, 4096),
        (lambda n: n * 0.5, 6.0),
        (float, 12.0),
        (int, 12),
        (str, "12"),
        (repr, "12"),
        (lambda n: f"{n}", "12"),
    ],
)
def test_a_number_that_code_computes_with_is_the_full_one_and_noted(use: Any, value: Any) -> None:
    assert use(size()) == value
    assert PerRankInt.diverging == {"here"}


@pytest.mark.parametrize(
    ("compare", "out", "noted"),
    [
        (lambda n: n > 4, True, False),
        (lambda n: n > 8, True, True),
        (lambda n: n >= 7, True, True),
        (lambda n: n < 7, False, True),
        (lambda n: n <= 12, True, False),
        (lambda n: n == 12, True, True),
        (lambda n: n != 5, True, False),
        (lambda n: n > 6.5, True, True),
        (lambda n: n == "12", False, False),
        (lambda n: n > size(), False, False),
    ],
)
def test_a_decision_that_a_rank_makes_otherwise_is_noted(compare: Any, out: bool, noted: bool) -> None:
    assert compare(size()) is out
    assert PerRankInt.diverging == ({"here"} if noted else set())


def test_ranks_are_shown_their_own_size() -> None:
    PerRankInt.shown = 1
    try:
        n = size(12, 7, 4)
    finally:
        PerRankInt.shown = None
    assert len(range(n)) == 4 and len(range(size(12, 7, 4))) == 12
    assert whole_of(n) == 12


def test_sizes_that_hash_alike_are_alike() -> None:
    assert hash(size()) != hash(12) and len({size(): 0, size(12, 7, 5): 1}) == 2


def test_a_shape_is_mapped_to_what_is_no_sizes() -> None:
    shape = LocalShape((PerRankInt.of(12, (6, 6)), 3))
    assert mapped(shape, lambda n: (n, n)) == ((12, 12), (3, 3))
    assert mapped(shape, int) == torch.Size([12, 3])
    assert pair(shape.numel()) == (36, (18, 18))


def test_arguments_with_full_sizes_and_with_those_of_a_rank() -> None:
    n = size(12, 7, 4)
    args = (LocalShape((2, n)), [n, "text"], slice(None, n), {"dim": n})
    assert plain(args) == (torch.Size([2, 12]), [12, "text"], slice(None, 12), {"dim": 12})
    assert on_rank(args, 1) == (torch.Size([2, 4]), [4, "text"], slice(None, 4), {"dim": 4})
    assert len(list(per_rank_ints(args))) == 4


def test_factors_are_in_lowest_terms() -> None:
    assert [fraction(6, 12), fraction(3, 2), fraction(0, 4), fraction(5, 0)] == [(1, 2), (3, 2), (0, 1), (5, 0)]
