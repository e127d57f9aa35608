from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_tp as ltp
from lightning_tp.infer.calls.local_sizes import LocalShape, PerRankInt, mapped
from lightning_tp.styles import RewrittenCalls
from lightning_tp.styles.calls.call import Call
from lightning_tp.styles.split import Ownership


def test_a_size_is_followed_through_arithmetic() -> None:
    n = PerRankInt.of(12, (6, 6))
    assert (n // 3, (n // 3).local) == (4, (2, 2))
    assert (2 * n + 1).local == (13, 13)
    assert type(n - n) is int
    assert type(PerRankInt.of(4, (4, 4))) is int


def test_a_shape_is_mapped_to_what_is_no_sizes() -> None:
    shape = LocalShape((PerRankInt.of(12, (6, 6)), 3))
    assert mapped(shape, lambda n: (n, n)) == ((12, 12), (3, 3))
    assert mapped(shape, int) == torch.Size([12, 3])


def test_a_decision_by_a_size_that_ranks_see_otherwise_is_noticed() -> None:
    PerRankInt.diverging = set()
    n = PerRankInt.of(12, (6, 6), frozenset({"here"}))
    assert n > 4
    assert not PerRankInt.diverging
    assert n > 8
    assert PerRankInt.diverging == {"here"}


def calls_of(between: Any, width: int = 8) -> list[Call]:
    """What changes in a module that does something between two layers."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.w = nn.Linear(4, width), nn.Linear(width, 4), nn.Parameter(torch.ones(width))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(between(self, self.a(x)))

    plan = ltp.infer_plan(Net(), (torch.zeros(2, 3, 4),), tp=2).without_sequence_parallel()
    return [c for r in plan.rules if isinstance(r.style, RewrittenCalls) for c in r.style.calls]


def test_nothing_changes_where_sizes_are_read_from_shards() -> None:
    assert calls_of(lambda m, x: x.view(x.shape[0], x.size(1), x.shape[-1]).relu()) == []


def test_a_size_that_is_known_as_a_whole_is_changed() -> None:
    (call,) = calls_of(lambda m, x: x.view(2, 3, 8).relu())
    assert (call.name, call.sizes) == ("view", (((2, 1, 2),), ((2, 1, 2),)))


def test_a_slice_is_taken_where_it_lies_on_a_rank() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 16), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y[..., :8] * y[..., 8:])

    plan = ltp.infer_plan(Net(), (torch.zeros(2, 3, 4),), tp=2).without_sequence_parallel()
    items = [c.items for r in plan.rules if isinstance(r.style, RewrittenCalls) for c in r.style.calls]
    assert items == [((1, 0, 4, 1, 8), (1, 0, 4, 1, 8)), ((1, 4, 8, 1, 8), (1, 4, 8, 1, 8))]


def test_a_whole_operand_is_cut_where_it_lies_beside_the_split_dim() -> None:
    (call,) = calls_of(lambda m, x: x * torch.arange(8.0))
    (operand,) = call.operands
    assert operand.part == (1, Ownership(((0, 4), (1, 4))))
    assert not operand.enter


def test_a_loop_over_one_place_in_the_code_holds_turns() -> None:
    def twice(m: Any, x: Tensor) -> Tensor:
        whole = torch.zeros(2, 3, 8)
        whole, x = (t.view(2, 3, 8) for t in (whole, x))
        return x + whole

    views = [c for c in calls_of(twice) if c.name == "view"]
    assert [bool(c.sizes) for c in views] == [False, True]


@pytest.mark.parametrize(
    "between",
    [lambda m, x: x.cumsum(-1), lambda m, x: x.sort(-1).values, lambda m, x: x[..., [3, 1, 0, 2, 7, 5, 4, 6]] @ torch.randn(8, 8)],
)
def test_what_needs_all_features_keeps_the_weights_whole_or_gathers_them(between: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(between(self, self.a(x))))

    plan = ltp.infer_plan(Net(), (torch.zeros(2, 3, 4),), tp=2).without_sequence_parallel()
    style = next((r.style for r in plan.rules if r.pattern == "a"), None)
    assert style is None or style.output == "replicate"  # type: ignore[attr-defined]
