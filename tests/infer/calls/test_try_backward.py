"""`autograd.Function`s on shards: what their backward gives on ranks, against one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import Function

from lightning_tp.infer.calls.layouts import Layout, OnRanks
from lightning_tp.infer.calls.recorded_call import NotOnShards
from lightning_tp.infer.calls.try_backward import check_backward
from lightning_tp.infer.follow.trace import TensorFacts
from lightning_tp.styles.calls.call import Call, Operand
from tests.infer.calls.recorded import LayoutsOf, halves, recorded

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class LayoutsWithFacts(LayoutsOf):
    partial = False  # whether a result without a layout has a partial gradient

    def shadow(self, t: Tensor) -> TensorFacts:
        label = torch.zeros((), dtype=torch.int64).expand(t.shape) if self.partial and self.layouts[id(t)] is None else None
        return TensorFacts(label)


def function(backward: Any) -> type[Function]:
    class Made(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
            ctx.save_for_backward(x, *others)
            return x.view_as(x) if not others else x * others[0]

    Made.backward = staticmethod(backward)  # type: ignore[assignment]
    return Made


def check(
    backward: Any,
    *others: Tensor,
    layouts: dict[int, Layout],
    results: Layout,
    operands: tuple[Operand, ...] = (),
    partial: bool = False,
) -> None:
    call = recorded(function(backward).apply, X, *others, layouts=layouts, results=results, partial_results=partial)
    known: Any = LayoutsWithFacts(call)
    known.partial = partial
    given = {id(g.tensor): OnRanks(g.tensor, g.layout) for g in call.given}
    check_backward(call, Call(call.name, call.site, operands), given, known)


def test_what_works_on_each_element_may_stay_on_shards() -> None:
    check(lambda ctx, g: g.clamp(-1, 1), layouts={0: halves(1)}, results=halves(1))


@pytest.mark.parametrize(
    "backward", [lambda ctx, g: g / (g.norm() + 1), lambda ctx, g: g - g.mean(-1, keepdim=True), lambda ctx, g: g.view(3, 8)]
)
def test_what_reduces_over_a_shard_or_has_sizes_of_its_own_may_not(backward: Any) -> None:
    with pytest.raises(NotOnShards, match=r"its (gradient|backward)"):
        check(backward, layouts={0: halves(1)}, results=halves(1))


def test_parts_of_a_gradient_have_to_add_up() -> None:
    check(lambda ctx, g: 2 * g, layouts={}, results=None, partial=True, operands=(Operand((0,), enter=True),))
    for backward in (lambda ctx, g: g + 1, lambda ctx, g: g.clamp(-1, 1)):
        with pytest.raises(NotOnShards, match="its gradient on shards is another one"):
            check(backward, layouts={}, results=None, partial=True, operands=(Operand((0,), enter=True),))


def test_a_whole_operand_beside_shards_gets_a_part_of_its_gradient() -> None:
    def backward(ctx: Any, g: Tensor) -> Any:
        x, scale = ctx.saved_tensors
        return g * scale, (g * x).sum().view(1)

    scale = torch.full((1,), 2.0)
    check(backward, scale, layouts={0: halves(1)}, results=halves(1), operands=(Operand((1,), enter=True),))
    with pytest.raises(NotOnShards):  # as if it were equal on all ranks
        check(backward, scale, layouts={0: halves(1)}, results=halves(1))


def test_a_zero_gradient_may_give_no_number() -> None:
    check(lambda ctx, g: g / g.abs(), layouts={0: halves(1)}, results=halves(1))
