"""What code does with a block's own number is noticed, but for using it as the index of a list."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from lightning_tp.infer.blocks.block_number import WatchedNumber, watch_numbers


@pytest.mark.parametrize(
    "use",
    [
        lambda n: n == 2,
        lambda n: n < 3,
        lambda n: n % 2,
        lambda n: 7 - n,
        lambda n: {n: 0},
        lambda n: f"{n}",
        lambda n: bool(n),
        lambda n: n & 1,
    ],
)
def test_operations_are_noticed_and_give_what_the_number_gives(use: Callable[[Any], Any]) -> None:
    uses: list[str] = []
    assert use(WatchedNumber(2, uses)) == use(2)
    assert uses


def test_an_index_of_a_list_is_not() -> None:
    uses: list[str] = []
    store = [None, None, None]
    store[WatchedNumber(2, uses)] = "kept"  # type: ignore[call-overload]
    assert (store, uses) == ([None, None, "kept"], [])


def test_a_copy_is_watched_by_itself() -> None:
    number = copy.deepcopy(WatchedNumber(2, []))
    assert number + 1 == 3 and number.uses == ["__add__"]


def test_numbers_are_watched_for_a_while() -> None:
    module = nn.Module()
    module.index = 3
    with pytest.raises(ZeroDivisionError), watch_numbers([(module, "index")]) as uses:
        assert type(module.index) is WatchedNumber and not uses
        module.index // 0
    assert uses == ["__floordiv__"] and type(module.index) is int and module.index == 3
