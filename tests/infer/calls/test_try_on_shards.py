from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_tp.infer.calls import try_on_shards
from lightning_tp.infer.calls.layouts import Sharded
from lightning_tp.infer.calls.local_sizes import PerRankInt
from lightning_tp.infer.calls.recorded_call import NotOnShards, RecordedCall
from lightning_tp.infer.calls.try_on_shards import fitting_operands
from lightning_tp.styles.calls.call import Call, Operand
from tests.infer.calls.recorded import LayoutsOf, halves, recorded, sharded

X, ROW = torch.randn(8, 8), torch.arange(8.0)
OWNED = halves(1).ownership
CUT = (Operand((1,), (1, OWNED), beside=(0,)),)


def tried(call: RecordedCall, known: set[Any] | None = None, **changes: Any) -> tuple[Operand, ...]:
    layouts: Any = LayoutsOf(call)
    return fitting_operands(call, Call(call.name, call.site, **changes), layouts, set() if known is None else known)


def test_a_cut_that_is_right_is_kept() -> None:
    call = recorded(torch.mul, X, ROW, layouts={0: halves(1)}, results=halves(1))
    assert tried(call, operands=CUT) == CUT


def test_an_operand_of_the_same_size_that_does_not_lie_beside_it_is_not_cut() -> None:
    """As many rows as columns: the mask goes by rows."""
    call = recorded(torch.matmul, torch.randn(8, 8), X, layouts={1: halves(1)}, results=halves(1))
    assert tried(call, operands=(Operand((0,), (1, OWNED)),)) == ()
    both = recorded(torch.addcmul, X, ROW, ROW[:, None].clone(), layouts={0: halves(1)}, results=halves(1))
    wrong = Operand((2,), (2, OWNED), enter=True)
    assert tried(both, operands=(*CUT, wrong)) == (*CUT, Operand((2,), None, enter=True))


def test_a_change_that_is_missing_is_noticed() -> None:
    call = recorded(torch.mul, X, ROW, layouts={0: halves(1)}, results=halves(1))
    with pytest.raises(NotOnShards, match=r"does not run on shards \(RuntimeError\)"):
        tried(call)
    rolled = recorded(torch.roll, X, 1, -1, layouts={0: halves(1)}, results=halves(1))
    with pytest.raises(NotOnShards, match="its result on shards is another one"):
        tried(rolled)
    viewed = recorded(Tensor.view, X, 8, 4, 2, layouts={0: halves(1)}, results=halves(1, 4))
    with pytest.raises(NotOnShards):
        tried(viewed)
    assert tried(viewed, sizes=(((1, 1, 2),),) * 2) == ()


def test_ranks_are_given_their_own_numbers() -> None:
    heads = PerRankInt.of(4, (2, 2))
    call = recorded(Tensor.view, X, 8, heads, 2, layouts={0: halves(1)}, results=halves(1, 4))
    assert tried(call) == ()


def test_the_last_rank_is_tried_too() -> None:
    """Right on the first rank only."""
    call = recorded(torch.triu, X, layouts={0: halves(1)}, results=halves(1))
    assert torch.equal(X.triu()[:, :4], X[:, :4].triu())
    with pytest.raises(NotOnShards, match="another one"):
        tried(call)


def test_what_a_call_writes_into_is_compared() -> None:
    y = X.clone()
    assert tried(recorded(Tensor.mul_, y, ROW, layouts={0: halves(1)}, results=halves(1)), operands=CUT) == CUT
    y = X.clone()
    call = recorded(Tensor.__setitem__, y, (..., slice(2, 4)), 0.0, layouts={0: halves(1)})
    with pytest.raises(NotOnShards, match="another one"):
        tried(call)


def test_a_call_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    known: set[Any] = set()
    tried(recorded(torch.mul, X, ROW, layouts={0: halves(1)}, results=halves(1)), known, operands=CUT)
    assert len(known) == 1
    monkeypatch.setattr(try_on_shards, "_compare", lambda *args: pytest.fail("tried again"))
    tried(recorded(torch.mul, X.clone(), ROW.clone(), layouts={0: halves(1)}, results=halves(1)), known, operands=CUT)


def test_values_on_the_meta_device_are_made_up() -> None:
    x, row = X.to("meta"), ROW.to("meta")
    assert tried(recorded(torch.mul, x, row, layouts={0: halves(1)}, results=halves(1)), operands=CUT) == CUT
    with pytest.raises(NotOnShards, match="another one"):
        tried(recorded(torch.roll, x, 1, -1, layouts={0: halves(1)}, results=halves(1)))
    index = torch.zeros(8, 8, dtype=torch.int64, device="meta")  # of which no value is known: not tried
    assert tried(recorded(torch.gather, x, 0, index, layouts={0: halves(1), 2: halves(1)}, results=halves(1))) == ()


@pytest.mark.parametrize(
    ("func", "args", "dim", "believed"),
    [
        (torch.mul, (X, ROW), 1, True),
        (torch.roll, (X, 1, 0), 1, False),
        (torch.tril, (X,), 1, False),
        (torch.tril, (X.expand(8, 8, 8),), 0, True),
        (torch.lerp, (X, X[:1].clone(), 0.5), 1, True),
        (F.pairwise_distance, (X, torch.zeros(8, 8)), 0, False),  # broadcasting would give (8, 8)
        (torch.gather, (X, 0, torch.zeros(8, 3, dtype=torch.int64)), 0, True),
    ],
)
def test_what_is_too_large_is_believed_where_all_positions_are_alike(
    func: Any, args: Any, dim: int, believed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(try_on_shards, "MOST_TRIED", 0)
    call = recorded(func, *args, layouts={0: halves(dim)}, results=halves(dim))
    if believed:
        assert tried(call) == ()
    else:
        with pytest.raises(NotOnShards):
            tried(call)


def test_nothing_sharded_to_try() -> None:
    """Only gradients are partial, and the tensors are empty."""
    assert tried(recorded(torch.mul, X[:0], ROW, partial_results=True, equal=(1,))) == ()


def test_rounding_is_no_difference() -> None:
    a = torch.tensor([1.0, 1000.0, float("inf"), float("nan")])
    assert try_on_shards._same(a, a + torch.tensor([0.5, 0.0, 0.0, 0.0]))  # relative to the largest
    assert not try_on_shards._same(a[:2], torch.tensor([3.0, 1000.0]))
    assert not try_on_shards._same(a, a.double()) and not try_on_shards._same(a, a[:3])
    assert not try_on_shards._same(torch.tensor([1]), torch.tensor([2]))


def test_operands_have_to_broadcast_where_a_call_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(try_on_shards, "MOST_TRIED", 0)
    x = torch.zeros(2, 3, 8)

    def check(func: Any, *args: Any) -> None:
        assert tried(recorded(func, *args, layouts={0: halves(2)}, results=halves(2))) == ()

    check(torch.mul, x, ROW)
    check(torch.mul, x, torch.ones(3, 1))
    check(lambda x, y: x.clone(), x, torch.zeros(5, 7))  # has no size of the split dim
    with pytest.raises(NotOnShards, match="do not broadcast"):
        check(lambda x, y: x.clone(), x, torch.zeros(8, 5))
    with pytest.raises(NotOnShards, match="do not broadcast"):
        check(lambda x, y: x.sum(0), x, torch.zeros(3, 8))  # another result than broadcasting gives


@pytest.mark.parametrize(
    ("other", "why"), [(sharded(1, (0, 2), (1, 6)), "does not run on shards"), (sharded(1, (1, 4), (0, 4)), "its result on shards")]
)
def test_operands_that_are_split_in_other_ways_do_not_line_up(other: Sharded, why: str) -> None:
    call = recorded(torch.mul, X, torch.randn(8, 8), layouts={0: halves(1), 1: other}, results=halves(1))
    with pytest.raises(NotOnShards, match=why):
        tried(call)
    rows = recorded(torch.mul, X, torch.randn(8, 8), layouts={0: halves(1), 1: halves(0)}, results=halves(1))
    with pytest.raises(NotOnShards):
        tried(rows)
