"""The tokens of a stream through its blocks: what it takes to shard the stream, or why it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_tp as ltp
from lightning_tp.infer.blocks.workload import Workload
from lightning_tp.infer.sequence.follow_tokens import follow_tokens
from lightning_tp.infer.sequence.rules import rules_by_name
from lightning_tp.infer.sequence.sequence_plan import Alternatives, NotSequenceParallel, Reduction, Region, SequencePlan
from lightning_tp.testing import randomize_
from tests.infer.sequence.test_streams import MLP, Attention, D, Experts, Model, PreNorm, Residual, ShiftedNorm, merged, noise

BLOCKS = ("blocks.0", "blocks.1")


class Direct(nn.Module):
    """Attention in the block's own code; `norms`: of how many tensors its queries and keys are made."""

    def __init__(self, norms: int = 1) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.n1, self.n2, self.n3 = (nn.LayerNorm(D) for _ in range(3))
        self.mlp, self.norms = MLP(), norms

    def forward(self, x: Tensor) -> Tensor:
        a = self.n1(x)
        b = a if self.norms == 1 else self.n2(x)
        x = x + self.o(merged(self.q(a), self.k(b), self.v(b)))
        return x + self.mlp(self.n3(x))


def followed(
    *blocks: nn.Module, regions: str = "attention mlp", reduction: Reduction = Reduction.OF_STREAM, tp: int = 2, **alternatives: Any
) -> SequencePlan:
    model, x = Model(MLP), noise(2, 12, 6)
    model.blocks = nn.ModuleList(blocks)
    randomize_(model)
    plan = ltp.infer_plan(model, (x,), tp=2).without_sequence_parallel()
    found = [Region(f"blocks.{i}.{n}", reduction) for i in range(len(blocks)) for n in regions.split()]
    names = tuple(f"blocks.{i}" for i in range(len(blocks)))
    workload = Workload(model, lambda m, x: m(x), x, tp)
    sequence = follow_tokens(workload, rules_by_name(plan, model), names, found, Alternatives(**alternatives))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return sequence


def pre_norm(mlp: Callable[[], nn.Module] = MLP) -> nn.Module:
    return PreNorm(Attention(), mlp())


def test_a_stream_of_attention_and_mlp() -> None:
    found = followed(pre_norm(), pre_norm())
    assert found.streams == {BLOCKS: 0}
    assert {r.name: (r.args, r.reduced) for r in found.regions.values()} == {
        f"{b}.{r}": ((0,), True) for b in BLOCKS for r in ("attention", "mlp")
    }
    assert found.reduced_layers == {f"{b}.{n}" for b in BLOCKS for n in ("attention.o", "mlp.down")}
    assert found.on_shards == {(f"{b}.{n}.{p}", f"{b}.{n}") for b in BLOCKS for n in ("n1", "n2") for p in ("weight", "bias")}
    assert not found.on_full and not found.deferred_layers


def test_a_stream_may_be_all_gathered_as_often_as_is_reduced_and_not_once_more() -> None:
    direct = "q k v o mlp"
    assert (
        len(followed(Direct(), Direct(), regions=direct).reduced_layers) == 4
    )  # for 4 all-gathers: queries, keys and values share one
    with pytest.raises(NotSequenceParallel, match="would be all-gathered 5 times for 4 reductions"):
        followed(Direct(), Direct(norms=2), regions=direct)


def test_at_the_ends_of_a_single_block_too_much_is_gathered() -> None:
    with pytest.raises(NotSequenceParallel, match="2 reductions in 1 blocks"):
        followed(pre_norm())


def test_a_sequence_has_a_token_for_each_rank() -> None:
    with pytest.raises(NotSequenceParallel, match="the sequence is shorter than tp"):
        followed(pre_norm(), pre_norm(), tp=13)
    assert followed(pre_norm(), pre_norm(), tp=12).streams


class Meets(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - x.mean(1, keepdim=True)


class MeetsOutside(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x - x.mean(1, keepdim=True)


def test_tokens_may_meet_in_a_region_only() -> None:
    with pytest.raises(NotSequenceParallel, match="tokens meet outside attention") as caught:
        followed(pre_norm(), MeetsOutside(Attention(), MLP()))
    assert caught.value.modules == {"blocks.1"}


class Full(PreNorm):
    """Adds what every rank has for all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.arange(12.0)[:, None]


def test_full_activations_may_not_meet_tokens() -> None:
    with pytest.raises(NotSequenceParallel, match="full activations meet tokens"):
        followed(pre_norm(), Full(Attention(), MLP()))


def test_a_residual_argument_is_noted_as_one_that_may_be_sharded() -> None:
    with pytest.raises(NotSequenceParallel) as caught:
        followed(Residual(), Residual())
    args = frozenset({("blocks.*.attention", 1), ("blocks.*.mlp", 1)})
    assert caught.value.alternatives.sharded_args == args
    found = followed(Residual(), Residual(), sharded_args=args)
    assert {r.args for r in found.regions.values()} == {(0,)}


def test_experts_have_partial_sums_when_they_return() -> None:
    def block() -> nn.Module:
        return pre_norm(Experts)

    with pytest.raises(NotSequenceParallel):
        followed(block(), block())
    found = followed(block(), block(), reduction=Reduction.AT_RETURN)
    assert found.deferred_layers == {f"{b}.{n}" for b in BLOCKS for n in ("attention.o", "mlp", "mlp.shared.down")}
    assert all(r.reduces_at_return for r in found.regions.values()) and not found.reduced_layers


def test_a_weight_that_is_computed_with_meets_tokens_where_its_result_does() -> None:
    def block() -> nn.Module:
        made = pre_norm()
        made.n1, made.n2 = ShiftedNorm(), ShiftedNorm()  # type: ignore[assignment]
        return made

    found = followed(block(), block())
    assert found.on_shards == {(f"{b}.{n}.weight", f"{b}.{n}") for b in BLOCKS for n in ("n1", "n2")}
    assert not found.on_full


class Between(Model):
    """A norm between the blocks."""

    def __init__(self) -> None:
        super().__init__(pre_norm)
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks[1](self.norm(self.blocks[0](self.inp(x)))))


def test_what_stands_between_the_blocks_may_not_work_on_tokens() -> None:
    assert not ltp.infer_plan(randomize_(Between()), (noise(2, 12, 6),), tp=2).sequence_parallel


def test_wider_partial_sums_than_the_stream_are_named() -> None:
    class Wide(MLP):
        """Its row-wise layer makes another width than the stream."""

        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Linear(96, 2 * D)

        def forward(self, x: Tensor) -> Tensor:
            a, b = super().forward(x).chunk(2, -1)
            return a * b.sigmoid()

    with pytest.raises(NotSequenceParallel) as caught:
        followed(pre_norm(Wide), pre_norm(Wide))
    assert caught.value.other_width == {"blocks.0.mlp", "blocks.1.mlp"}
    found = followed(pre_norm(Wide), pre_norm(Wide), reduction=Reduction.OF_ANY_WIDTH)
    assert found.reduced_layers == {f"{b}.{n}" for b in BLOCKS for n in ("attention.o", "mlp.down")}
