from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_tp.infer.calls.changes import RULES, change_of, move_along_one_dim
from lightning_tp.infer.calls.local_sizes import PerRankInt
from lightning_tp.infer.calls.recorded_call import Change, NotOnShards, RecordedCall
from lightning_tp.styles.calls.call import Operand
from tests.infer.calls.recorded import LayoutsOf, halves, recorded, sharded

X, ROW, WEIGHT = torch.randn(3, 8), torch.arange(8.0), torch.randn(8, 8)


def changed(call: RecordedCall) -> Change:
    layouts: Any = LayoutsOf(call)
    return change_of(call, layouts, set())


def test_rules_are_looked_up_by_name() -> None:
    assert {RULES[name].__name__ for name in ("view", "reshape", "expand")} == {"resize"}
    assert [RULES[n].__name__ for n in ("chunk", "__getitem__", "einsum", "conv2d")] == ["split", "getitem", "einsum", "convolve"]


def test_a_change_is_tried() -> None:
    assert changed(recorded(torch.mul, X, ROW, layouts={0: halves(1)}, results=halves(1))).call.operands
    with pytest.raises(NotOnShards, match="another one"):
        changed(recorded(torch.cumsum, X, 1, layouts={0: halves(1)}, results=halves(1)))


def test_random_numbers_are_not_compared() -> None:
    assert not changed(recorded(F.dropout, X, 0.5, layouts={0: halves(1)}, results=halves(1))).call.changes


def test_a_product_with_a_row_wise_weight_leaves_partial_sums() -> None:
    call = recorded(F.linear, X, WEIGHT, layouts={0: halves(1)}, split=(1,), products=(("in", "w"),))
    change = changed(call).call
    assert change.leave and not change.operands and change.logits is None


def test_logits_stay_split_and_their_input_has_a_partial_gradient() -> None:
    call = recorded(F.linear, X, WEIGHT, split=(1,), products=(("out", "w"),), vocabulary=8)
    change = changed(call).call
    assert change.logits == 8 and change.operands == (Operand((0,), None, enter=True),) and not change.leave


def test_what_can_not_run_on_shards_says_why_and_whose_features_it_needs() -> None:
    two = recorded(torch.mul, X, ROW, layouts={0: halves(1)}, products=(("out", "w"), ("in", "v")))
    with pytest.raises(NotOnShards, match="several products"):
        changed(two)
    with pytest.raises(NotOnShards, match="split along 2 dims") as raised:
        changed(recorded(torch.mul, X, WEIGHT[:3], layouts={0: halves(1), 1: "split along 2 dims"}, results=halves(1)))
    (tensor,) = raised.value.tensors or []
    assert tensor.shape == (3, 8) and tensor is not X


def test_numbers_that_are_known_for_sizes_stay_known_where_the_trial_fails() -> None:
    n = PerRankInt.of(8, (4, 4))
    call = recorded(Tensor.view, X, 3, n, layouts={0: halves(1)}, results=sharded(1, (0, 2), (1, 2)))  # of the right size
    with pytest.raises(NotOnShards, match="another one") as raised:
        changed(call)
    assert raised.value.sizes == (n,)


@pytest.mark.parametrize(("args", "moves"), [((0, 0), False), ((1, 0), True), ((-1, 0), True)])
def test_a_move_along_the_split_dim_is_another_one_on_shards(args: Any, moves: bool) -> None:
    call = recorded(torch.select, X, *args, layouts={0: halves(1)}, results=None if moves else halves(0))
    if moves:
        with pytest.raises(NotOnShards, match="along the split dimension"):
            move_along_one_dim(call)
    else:
        assert not move_along_one_dim(call).call.changes
    assert not move_along_one_dim(recorded(torch.movedim, X, 1, 0, layouts={0: halves(1)}, results=halves(0))).call.changes
