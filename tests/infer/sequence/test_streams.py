"""Where the stream lies in shards of the sequence by inference: what the plan says, and one process at lengths that it was not made from."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import lightning_tp as ltp
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.core.comm.state import SEQUENCE, I, P, R
from lightning_tp.styles import PrepareInput, PrepareOutput, RewrittenCalls, Rowwise, Sequence
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks

D, H = 32, 4


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(*(t.unflatten(-1, (-1, D // H)).transpose(1, 2) for t in (q, k, v)))
    return y.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """`keys`: the width of keys and values; one head of them can't be split."""

    def __init__(self, keys: int = D) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(D, D), nn.Linear(D, keys), nn.Linear(D, keys), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(merged(q, *(t.repeat(1, 1, D // t.shape[-1]) for t in (k, v))))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 96), nn.Linear(96, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class AddNorm(nn.Module):
    """The end of a post-norm half: the residual is a second argument."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense, self.norm, self.drop = nn.Linear(width, D), nn.LayerNorm(D), nn.Dropout(0.0)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.norm(self.drop(self.dense(y)) + x)


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.first = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D), AddNorm(D)
        self.up, self.second = nn.Linear(D, 96), AddNorm(96)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(merged(self.q(x), self.k(x), self.v(x)), x)
        return self.second(F.gelu(self.up(x)), x)


class Experts(nn.Module):
    """Flattened tokens, a router, experts as one parameter, a shared expert behind a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.gate, self.shared = nn.Linear(D, 4), nn.Linear(D, 1), MLP()
        self.up, self.down = nn.Parameter(torch.zeros(4, D, 64)), nn.Parameter(torch.zeros(4, 64, D))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, chosen = self.router(flat).softmax(-1).topk(2, -1)
        y = torch.zeros_like(flat)
        for e in range(4):
            token, slot = torch.where(chosen == e)
            y.index_add_(0, token, (F.gelu(flat[token] @ self.up[e]) @ self.down[e]) * weights[token, slot, None])
        return (y + torch.sigmoid(self.gate(flat)) * self.shared(flat)).view_as(x)


class PreNorm(nn.Module):
    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attention, self.mlp, self.n1, self.n2 = attention, mlp, nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.n1(x))
        return x + self.mlp(self.n2(x))


class AddsAttention(Attention):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        return residual + super().forward(x)


class AddsMLP(MLP):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + residual


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2, self.attention, self.mlp = nn.LayerNorm(D), nn.LayerNorm(D), AddsAttention(), AddsMLP()

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(self.n1(x), x)
        return self.mlp(self.n2(x), x)


class ReadsLength(nn.Module):
    """The block's own code reads the length, for what is whole."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o, self.n1, self.n2, self.mlp = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.LayerNorm(D), nn.LayerNorm(D), MLP()

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = (t.view(B, T, H, C // H).transpose(1, 2) for t in self.qkv(self.n1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous().view(B, T, C)
        x = x + self.o(y)
        return x + self.mlp(self.n2(x))


class ShiftedNorm(nn.Module):
    """A weight that is used as 1 + weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Mixed(nn.Module):
    """Tokens meet between attention and MLP."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


class Model(nn.Module):
    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.inp, self.blocks, self.out = nn.Linear(6, D), nn.ModuleList([block() for _ in range(2)]), nn.Linear(D, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def shifted() -> nn.Module:
    block = PreNorm(Attention(), MLP())
    block.n1, block.n2 = ShiftedNorm(), ShiftedNorm()  # type: ignore[assignment]
    return block


def mixed() -> nn.Module:
    block = PreNorm(Attention(), MLP())
    block.n2 = Mixed()  # type: ignore[assignment]
    return block


ENCODER = {"dropout": 0.0, "batch_first": True}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "post_norm": lambda: Model(PostNorm),
    "experts": lambda: Model(lambda: PreNorm(Attention(), Experts())),
    "one_key_head": lambda: Model(lambda: PreNorm(Attention(D // H), MLP())),
    "residual_argument": lambda: Model(Residual),
    "reads_length": lambda: Model(ReadsLength),
    "shifted_norm": lambda: Model(shifted),
    "torch_layers": lambda: Model(lambda: nn.TransformerEncoderLayer(D, H, 64, **ENCODER)),
    "encoder_decoder": lambda: nn.Transformer(D, H, 2, 2, 64, dropout=0.0, batch_first=True),
}
LENGTHS = ((12, 10), (15, 16), (16, 15), (7, 9))  # the plan is made from the first


def build(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return randomize_(MODELS[name]()).train()


def inputs(name: str, lengths: tuple[int, int]) -> tuple[Tensor, ...]:
    if name == "encoder_decoder":
        return noise(2, lengths[0], D), noise(2, lengths[1], D)
    return (noise(2, lengths[0], 6),)


def step(model: nn.Module, x: tuple[Tensor, ...], gradients: Any) -> dict[str, Any]:
    model.zero_grad()
    y = model(*x)
    loss = (y * noise(*y.shape)).sum()
    loss.backward()
    return {"out": y.detach(), **gradients(model)}


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def plan_of(name: str) -> ltp.Plan:
    return ltp.infer_plan(build(name), inputs(name, LENGTHS[0]), tp=2)


def on_ranks() -> dict[str, str]:
    mesh = make_mesh("cpu", 1, dist.get_world_size())
    failed: dict[str, str] = {}
    for name in MODELS:
        plan = ltp.infer_plan(build(name), inputs(name, LENGTHS[0]), tp=dist.get_world_size())
        for how, of in (("shards", plan), ("whole", plan.without_sequence_parallel())):
            try:
                with sdpa_kernel(SDPBackend.MATH):
                    model = ltp.parallelize(build(name), mesh, ltp.Plan.from_json(of.to_json()))
                    for lengths in LENGTHS:
                        got = step(model, inputs(name, lengths), ltp.full_gradients)
                        want = step(build(name), inputs(name, lengths), grads)
                        assert_trees_close(got, want, rtol=2e-3, floor=1e-3, name=f"{lengths}")
            except Exception:
                failed[f"{name} {how}"] = traceback.format_exc(limit=-4)
    return failed


@pytest.mark.parametrize("tp", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_equals_one_process_at_any_length(tp: int) -> None:
    for failed in run_ranks(on_ranks, tp):
        assert not failed, "\n".join(f"{k}: {v}" for k, v in failed.items())


@pytest.mark.parametrize("name", MODELS)
def test_the_stream_is_in_shards_and_crosses_once_into_and_once_out_of_a_region(name: str) -> None:
    plan = plan_of(name)
    assert plan.sequence_parallel
    model = build(name)
    styles = [e.style for e in plan.check(model, 2).entries]
    assert not any(s.output == I for s in styles if isinstance(s, Rowwise))
    assert not any(c.leave and c.to == I for s in styles if isinstance(s, RewrittenCalls) for c in s.calls)
    norms = [
        n for n, m in model.named_modules() if isinstance(m, (nn.LayerNorm, ShiftedNorm)) and (".layers." in n or "blocks" in n)
    ]
    on_tokens = [r for r in plan.rules if isinstance(r.style, Sequence)]
    assert norms
    assert [n for n in norms if not any(r.matches(n) or r.matches(f"{n}.weight") for r in on_tokens)] == []


def test_experts_are_summed_once_when_their_block_returns() -> None:
    plan = plan_of("experts")
    mlp = [r.style for r in plan.rules if r.matches("blocks.0.mlp")]
    assert [s.wanted for s in mlp if isinstance(s, PrepareInput)] == [R]
    assert [(s.arrives, s.wanted) for s in mlp if isinstance(s, PrepareOutput)] == [(P, SEQUENCE)]


@pytest.mark.parametrize("block", [mixed, lambda: PreNorm(Attention(), Mixed())])
def test_the_stream_stays_whole_where_tokens_meet(block: Callable[[], nn.Module]) -> None:
    model = randomize_(Model(block))
    assert not ltp.infer_plan(model, (noise(2, 12, 6),), tp=2).sequence_parallel


def test_a_single_block_stays_whole() -> None:
    model = Model(PostNorm)
    del model.blocks[1]
    assert not ltp.infer_plan(randomize_(model), (noise(2, 12, 6),), tp=2).sequence_parallel
