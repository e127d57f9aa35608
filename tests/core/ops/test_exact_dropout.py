"""Exact masks: those that one process draws, put together from the ranks' regions; and which region a shard is."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_tp as ltp
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.core.ops.exact_dropout import DropoutRegion, LayerOutput, dropout_region, run_exact
from lightning_tp.core.ops.random_calls import SDPA, FunctionCall
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks
from tests.core.ops.dropout_models import Net, plan, steps


def axis_of(rank: int, size: int = 2, seq_len: int | None = None) -> Any:
    return SimpleNamespace(rank=rank, size=size, seq_len=seq_len)


def masks(shards: list[Tensor], regions: list[DropoutRegion], p: float = 0.4, seq_len: int | None = None) -> list[Tensor]:
    """Of all ranks, each drawn from the same state."""
    found = []
    for rank, (shard, region) in enumerate(zip(shards, regions, strict=True)):
        torch.manual_seed(5)
        found.append(region.mask(shard, axis_of(rank, len(shards), seq_len), p))
        assert found[-1].shape == shard.shape
    return found


def mask_of_one(shape: tuple[int, ...], p: float = 0.4) -> Tensor:
    torch.manual_seed(5)
    return F.dropout(torch.ones(shape), p, True)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_regions_of_even_shards(dim: int) -> None:
    full = torch.zeros(4, 6, 8)
    got = masks(list(full.chunk(2, dim)), [DropoutRegion(dim)] * 2)
    assert torch.equal(torch.cat(got, dim), mask_of_one((4, 6, 8)))
    assert got[0].unique().tolist() == pytest.approx([0.0, 1 / 0.6])


def test_regions_of_uneven_shards() -> None:
    spans = [(7, 0, 3), (7, 3, 5), (7, 5, 7)]
    shards = [torch.zeros(2, 4, stop - start) for _, start, stop in spans]
    got = masks(shards, [DropoutRegion(2, span=span) for span in spans])
    assert torch.equal(torch.cat(got, 2), mask_of_one((2, 4, 7)))


def test_regions_of_heads_behind_the_batch() -> None:
    batch, heads, size = 3, 2, 2
    got = masks([torch.zeros(batch * heads, 5, 5)] * size, [DropoutRegion(0, heads=heads)] * size)
    full = mask_of_one((batch * size * heads, 5, 5)).view(batch, size * heads, 5, 5)
    assert torch.equal(torch.cat([m.view(batch, heads, 5, 5) for m in got], 1), full)


def test_padding_of_the_sequence_is_dropped() -> None:
    shards = [torch.zeros(2, 3, 4)] * 3  # of a sequence of 7: 3, 3 and 1
    got = torch.cat(masks(shards, [DropoutRegion(1, sequence=True)] * 3, seq_len=7), 1)
    assert torch.equal(got[:, :7], mask_of_one((2, 7, 4)))
    assert not got[:, 7:].any()
    got = torch.cat(masks(shards, [DropoutRegion(1, sequence=True)] * 3, seq_len=5), 1)  # nothing is left for the last rank
    assert torch.equal(got[:, :5], mask_of_one((2, 5, 4))) and not got[:, 5:].any()


def test_masks_are_drawn_in_the_order_of_the_memory() -> None:
    shard = torch.zeros(5, 2, 3).transpose(0, 1)  # (2, 5, 3), sequence first in memory
    full = mask_of_one((10, 2, 3)).transpose(0, 1)
    assert torch.equal(torch.cat(masks([shard, shard], [DropoutRegion(1)] * 2), 1), full)


def test_dropout_of_a_shard() -> None:
    x = torch.randn(2, 3, 8)
    torch.manual_seed(5)
    whole = F.dropout(x, 0.3, True)
    for rank, shard in enumerate(x.chunk(2, 2)):
        torch.manual_seed(5)
        out = run_exact(FunctionCall(F.dropout, (shard, 0.3), {"training": True}), DropoutRegion(2), axis_of(rank))
        assert torch.equal(out, whole.chunk(2, 2)[rank]) and out is not shard
        own = shard.clone()
        torch.manual_seed(5)
        out = run_exact(FunctionCall(F.dropout, (own, 0.3, True, True), {}), DropoutRegion(2), axis_of(rank))
        assert out is own and torch.equal(own, whole.chunk(2, 2)[rank])


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.2},
    "bool": {"attn_mask": torch.ones(5, 5).tril().bool()},
    "additive": {"attn_mask": torch.linspace(-1, 1, 25).view(5, 5)},
    "a row of nothing": {"attn_mask": torch.arange(5)[:, None].expand(5, 5) > 0},
    "grouped queries": {"enable_gqa": True},
}


@pytest.mark.parametrize("name", MASKS)
def test_attention_of_some_heads(name: str) -> None:
    """The math kernel with the mask of all heads, though a rank has some of them: values and gradients."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kv_heads = 2 if name == "grouped queries" else 4
    q, k, v = (torch.randn(2, h, 5, 8, requires_grad=True) for h in (4, kv_heads, kv_heads))
    torch.manual_seed(5)
    with sdpa_kernel(SDPBackend.MATH):
        whole = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, **MASKS[name])
    whole.square().sum().backward()
    expected = [t.grad.clone() for t in (q, k, v)]  # type: ignore[union-attr]
    for rank in range(2):
        mine = [t.detach().chunk(2, 1)[rank].clone().requires_grad_() for t in (q, k, v)]
        torch.manual_seed(5)
        out = run_exact(FunctionCall(SDPA, tuple(mine), {"dropout_p": 0.5, **MASKS[name]}), DropoutRegion(1), axis_of(rank))
        torch.testing.assert_close(out, whole.chunk(2, 1)[rank])
        out.square().sum().backward()
        for got, want in zip(mine, expected, strict=True):
            torch.testing.assert_close(got.grad, want.chunk(2, 1)[rank])


# ------------------------------------------------------------------------------------------------------------ which region


def region(shape: tuple[int, ...], layer: LayerOutput | None, **more: Any) -> DropoutRegion | None:
    """Of rank 0 of 2; None if it can't be told."""
    shapes = more.get("shapes", [shape, shape])
    call = FunctionCall(more.get("func", F.dropout), (torch.empty(shape),), {})
    try:
        return dropout_region(call, shapes, axis_of(0, seq_len=more.get("seq_len")), more.get("module", nn.Linear(1, 1)), layer)
    except ltp.TPError as error:
        assert f"for a shard of shape {shape}, and it can't be told which region of the full activation that is" in str(error)
        return None


COLUMN = LayerOutput(torch.Size((2, 6, 8)), column_parallel=True, in_rank_order=True)
FUSED = LayerOutput(torch.Size((2, 6, 8)), column_parallel=True, in_rank_order=False)
ROW = LayerOutput(torch.Size((2, 3, 8)), column_parallel=False, in_rank_order=True)


def test_which_region_a_shard_is() -> None:
    assert region((2, 6, 8), COLUMN) == DropoutRegion(2)
    assert region((2, 6, 8), COLUMN, shapes=[(2, 6, 8), (2, 6, 7)]) == DropoutRegion(2, span=(15, 0, 8))
    assert region((2, 6, 8), COLUMN, func=SDPA) == DropoutRegion(0, heads=1)  # no hidden features: one head on each rank
    assert region((2, 4, 6, 6), COLUMN) == region((6, 4, 2, 2), COLUMN) == DropoutRegion(1)  # batch first or second
    assert region((2, 4, 6, 6), COLUMN, func=SDPA, shapes=[(2, 4, 6, 6), (2, 3, 6, 6)]) == DropoutRegion(1, span=(7, 0, 4))
    assert region((8, 6, 6), COLUMN) == DropoutRegion(0, heads=4)
    assert region((8, 6, 6), COLUMN, shapes=[(8, 6, 6), (6, 6, 6)]) is None  # how many heads of each sample?
    assert region((7, 6, 6), COLUMN) is None and region((8, 5, 6), COLUMN) is None
    assert region((3, 4, 7, 7), COLUMN) is None  # another batch
    assert region((12, 8), COLUMN) is None and region((2, 6, 8), COLUMN, shapes=[(2, 6, 8), (12, 8)]) is None
    assert region((2, 6, 8), FUSED) is None and region((2, 4, 6, 6), FUSED) is None


def test_regions_of_the_sequence() -> None:
    assert region((2, 3, 8), ROW, seq_len=6) == region((2, 3, 8), None, seq_len=5) == DropoutRegion(1, sequence=True)
    assert region((2, 3, 8), ROW) is None and region((2, 3, 8), ROW, seq_len=8) is None and region((2, 3), None, seq_len=6) is None
    assert region((2, 3, 8), COLUMN, seq_len=6) is None  # whatever follows a column-parallel layer has sharded features


def test_attention_that_is_written_out() -> None:
    module = nn.MultiheadAttention(8, 2)
    for layer in (COLUMN, FUSED, ROW, None):
        assert region((2, 1, 6, 6), layer, module=module) == DropoutRegion(1)
    assert region((2, 6, 8), COLUMN, module=module) == DropoutRegion(2)


def test_what_is_never_told() -> None:
    assert region((2, 6, 8), COLUMN, func=F.alpha_dropout) is None
    assert region((2, 6, 8), COLUMN, module=None) is None


# ------------------------------------------------------------------------------------------------------------ on real ranks


@pytest.mark.parametrize("sequence", [False, True], ids=["whole stream", "sequence parallel"])
def test_exact_masks_are_those_of_one_process(sequence: bool) -> None:
    ways = ("sdpa", "module", "function")
    refs: dict[str, tuple[list[float], dict[str, Tensor]]] = {}
    for how in ways:
        model = randomize_(Net(how))
        torch.manual_seed(7)
        refs[how] = steps(model), ltp.full_state_dict(model)

    def body() -> None:
        mesh = make_mesh("cpu", 1, dist.get_world_size())
        for how in ways:
            for checkpointing in (None, "block"):
                model = randomize_(Net(how))
                ltp.parallelize(model, mesh, plan(sequence), dropout="exact", activation_checkpointing=checkpointing)
                torch.manual_seed(7)
                assert steps(model) == pytest.approx(refs[how][0], rel=1e-5), how
                assert_trees_close(ltp.full_state_dict(model), refs[how][1], rtol=1e-4, name=f"{how}, {checkpointing}")

    run_ranks(body, 2)


class Noise(nn.Module):
    """An MLP with random numbers of some kind inside."""

    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.how = nn.Linear(8, 16), nn.Linear(16, 8), how

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.how(self.up(x)))


@pytest.mark.parametrize(
    "how, message",
    [
        (lambda x: x + torch.rand(x.shape), "draws `rand` of shape"),
        (lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)), "draws `bernoulli` of shape"),
        (lambda x: F.alpha_dropout(x, 0.5, True), r"draws random numbers \(`alpha_dropout`\) for a shard of shape \(2, 3, 8\)"),
        (lambda x: F.dropout(x.flatten(), 0.5, True).view_as(x), "it can't be told which region of the full activation"),
    ],
)
def test_what_cant_be_exact_is_refused(how: Callable[[Tensor], Tensor], message: str) -> None:
    def body() -> None:
        model = ltp.parallelize(
            randomize_(Noise(how)), make_mesh("cpu", 1, 2), {"up": "colwise", "down": "rowwise"}, dropout="exact"
        )
        x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
        with pytest.raises(ltp.TPError, match=message):
            model(x)

    run_ranks(body, 2)
