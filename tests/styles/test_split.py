from __future__ import annotations

import torch

from lightning_tp.styles.split import Ownership


def test_an_ownership_is_the_shortest_that_is_repeated() -> None:
    ownership = Ownership.of(torch.tensor([0, 0, 1, 1] * 3))
    assert ownership == Ownership(((0, 2), (1, 2)))
    assert (ownership.period, ownership.local(12, 0), ownership.index(1, 8).tolist()) == (4, 6, [2, 3, 6, 7])


def test_what_every_rank_has_counts_for_each() -> None:
    ownership = Ownership(((0, 2), (1, 2), (-1, 3)))
    assert ownership.ranges(0) == ((0, 2), (4, 7))
    assert ownership.ranges(1) == ((2, 7),)
    assert ownership.count(1) == 5
