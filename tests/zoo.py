"""Tiny models, one for each way in which features flow through a transformer, and some of transformers' own. No tests here.

`CASES[name]()` gives a fresh model with random biases and norm weights, the inputs of its forward, and a loss of what it returns.
`HELD[name]` is the share of all parameters that one of two ranks may hold.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tp.testing import randomize_

D, H, V = 32, 4, 301
Built = tuple[nn.Module, dict[str, Any], Callable[[Any], Tensor]]
CASES: dict[str, Callable[[], Built]] = {}
HELD: dict[str, float] = {}


def case(name: str, build: Callable[[], Built], held: float = 0.66) -> None:
    def fresh() -> Built:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model, inputs, loss = build()
        return randomize_(model).train(), inputs, loss

    CASES[name], HELD[name] = fresh, held


def ids(batch: int = 2, length: int = 12, vocab: int = V, seed: int = 2) -> Tensor:
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def next_token(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))


def weighted(x: Tensor) -> Tensor:
    """A scalar that each element of x has a part in."""
    return (x * noise(*x.shape, seed=9)).mean() * 10 + x.pow(2).mean()


# ---------------------------------------------------------------------------------------------------------------- blocks


class MLP(nn.Module):
    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, width), nn.Linear(width, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Attention(nn.Module):
    """Separate q, k, v; head count from the width of the input, as nanoGPT computes it."""

    def __init__(self, heads: int = H) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))

    def heads_of(self, x: Tensor) -> tuple[Tensor, ...]:
        B, S, C = x.shape
        return tuple(f(x).view(B, S, self.heads, C // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads_of(x)
        return self.merged(F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def merged(self, y: Tensor) -> Tensor:
        B, _H, S, _ = y.shape
        return self.o(y.transpose(1, 2).reshape(B, S, D))


class Block(nn.Module):
    def __init__(self, attention: nn.Module, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.n1, self.n2, self.attention, self.mlp = nn.LayerNorm(D), nn.LayerNorm(D), attention, mlp or MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.n1(x))
        return x + self.mlp(self.n2(x))


class LM(nn.Module):
    def __init__(self, blocks: list[nn.Module], vocab: int = V, tied: bool = False) -> None:
        super().__init__()
        self.emb, self.blocks = nn.Embedding(vocab, D), nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, vocab, bias=False)
        if tied:
            self.head.weight = self.emb.weight

    def hidden(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Any:
        return self.head(self.hidden(tokens))


def lm(
    name: str, attention: Callable[[], nn.Module] = Attention, mlp: Callable[[], nn.Module] = MLP, held: float = 0.66, **kwargs: Any
) -> None:
    def build() -> Built:
        tokens = ids(vocab=kwargs.get("vocab", V))
        model = LM([Block(attention(), mlp()) for _ in range(2)], **kwargs)
        return model, {"tokens": tokens}, lambda out: next_token(out, tokens)

    case(name, build, held)


# ------------------------------------------------------------------------------------------------------------- attention


class Fused(Attention):
    """One weight for q, k and v, taken apart in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        del self.q, self.k, self.v
        self.qkv, self.how = nn.Linear(D, 3 * D), how

    def heads_of(self, x: Tensor) -> tuple[Tensor, ...]:
        B, S, C = x.shape
        y = self.qkv(x)
        if self.how == "split":
            return tuple(t.view(B, S, H, C // H).transpose(1, 2) for t in y.split(C, dim=2))
        if self.how == "slices":
            return tuple(t.view(B, S, H, -1).transpose(1, 2) for t in (y[..., :C], y[..., C : 2 * C], y[..., 2 * C :]))
        if self.how == "part_first":
            return y.view(B, S, 3, H, C // H).permute(2, 0, 3, 1, 4).unbind(0)
        if self.how == "head_first":
            return y.view(B, S, H, 3 * C // H).transpose(1, 2).chunk(3, -1)
        q, k, v = y.unflatten(-1, (H, C // H, 3)).permute(4, 0, 2, 1, 3)
        return q, k, v


class Grouped(Attention):
    """Fewer heads of keys and values."""

    def __init__(self, kv: int, how: str) -> None:
        super().__init__()
        self.kv, self.how, self.k, self.v = kv, how, nn.Linear(D, kv * D // H), nn.Linear(D, kv * D // H)

    def forward(self, x: Tensor) -> Tensor:
        B, S, _ = x.shape
        q = self.q(x).view(B, S, H, -1).transpose(1, 2)
        k, v = (f(x).view(B, S, self.kv, -1).transpose(1, 2) for f in (self.k, self.v))
        if self.how == "repeat":
            k, v = (t.repeat_interleave(H // self.kv, 1) for t in (k, v))
        elif self.how == "expand":
            k, v = (t[:, :, None].expand(B, self.kv, H // self.kv, S, D // H).reshape(B, H, S, D // H) for t in (k, v))
        elif self.how == "grouped":
            q = q.view(B, self.kv, H // self.kv, S, D // H)
            a = (torch.einsum("bgrqd,bgkd->bgrqk", q, k) / 4).softmax(-1)
            return self.merged(torch.einsum("bgrqk,bgkd->bgrqd", a, v).reshape(B, H, S, D // H))
        return self.merged(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.how == "native"))


class FusedMQA(Attention):
    """q of all heads, and one k and v, in one weight."""

    def __init__(self) -> None:
        super().__init__()
        del self.q, self.k, self.v
        self.qkv = nn.Linear(D, D + 2 * D // H)

    def forward(self, x: Tensor) -> Tensor:
        B, S, _ = x.shape
        q, k, v = self.qkv(x).split((D, D // H, D // H), -1)
        q = q.view(B, S, H, D // H).transpose(1, 2)
        a = (q @ k.unsqueeze(1).transpose(-1, -2) / 3).softmax(-1)
        return self.merged(a @ v.unsqueeze(1))


class PerHead(nn.Module):
    """A weight for each head, as an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Parameter(torch.zeros(H, D, D // H)) for _ in range(3))
        self.wo, self.bias = nn.Parameter(torch.zeros(H, D // H, D)), nn.Parameter(torch.zeros(H, D // H))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bsd,hdk->bhsk", x, w) for w in (self.wq, self.wk, self.wv))
        a = (torch.einsum("bhsk,bhtk->bhst", q + self.bias[None, :, None], k) / 3).softmax(-1)
        return torch.einsum("bhst,bhtk,hkd->bsd", a, v, self.wo)


class OwnConv1D(nn.Module):
    """Weights (in, out) and addmm, without modules."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.zeros(D, 3 * D)), nn.Parameter(torch.zeros(3 * D))
        self.wo, self.bo = nn.Parameter(torch.zeros(D, D)), nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        B, S, C = x.shape
        q, k, v = torch.addmm(self.b, x.reshape(-1, C), self.w).view(B, S, -1).split(C, 2)
        q, k, v = (t.view(B, S, H, C // H).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous().view(-1, C)
        return torch.addmm(self.bo, y, self.wo).view(B, S, C)


class TorchAttention(nn.Module):
    def __init__(self, need_weights: bool = True, cross: bool = False, heads: int = H, **kwargs: Any) -> None:
        super().__init__()
        sizes = {"kdim": 24, "vdim": 20} if cross else {}
        self.m = nn.MultiheadAttention(D, heads, **{"batch_first": True, **sizes, **kwargs})
        self.keys, self.values = (nn.Linear(D, 24), nn.Linear(D, 20)) if cross else (nn.Identity(), nn.Identity())
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        if not self.m.batch_first:
            x = x.transpose(0, 1)
        y, weights = self.m(x, self.keys(x), self.values(x), need_weights=self.need_weights)
        if not self.m.batch_first:
            y = y.transpose(0, 1)
        return y if weights is None else y + weights.mean()


class Biased(Attention):
    """Something for each head that is added to, or stands beside, the scores, keys or values."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, H + 1))
        self.table = nn.Embedding(8, H) if how == "table" else None
        self.sink = nn.Parameter(torch.zeros(H)) if how == "sinks" else None
        self.null = nn.Parameter(torch.zeros(2, H, 2, D // H)) if how == "null" else None
        self.prefix = nn.Parameter(torch.zeros(3, D)) if how == "prefix" else None
        self.scale = nn.Parameter(torch.zeros(H, D // H)) if how == "norm" else None
        self.gate = nn.Linear(D, H) if how == "gate" else None

    def forward(self, x: Tensor) -> Tensor:
        B, S, _ = x.shape
        q, k, v = self.heads_of(x)
        if self.scale is not None:
            q = F.normalize(q.transpose(1, 2), dim=-1).mul(self.scale).transpose(1, 2)
        if self.null is not None:
            k, v = (torch.cat((n.expand(B, -1, -1, -1), t), 2) for n, t in zip(self.null, (k, v)))
        if self.prefix is not None:
            k, v = (
                torch.cat((f(self.prefix).view(1, 3, H, -1).transpose(1, 2).expand(B, -1, -1, -1), t), 2)
                for f, t in ((self.k, k), (self.v, v))
            )
        scores = q @ k.transpose(-1, -2) / 3
        distance = torch.arange(S)[None] - torch.arange(S)[:, None]
        if self.how == "alibi":
            scores = scores + self.slopes[:, None, None] * distance
        if self.table is not None:
            scores = scores + self.table(distance.clamp(-4, 3) + 4).permute(2, 0, 1)[None]
        if self.sink is not None:
            scores = torch.cat((scores, self.sink.view(1, -1, 1, 1).expand(B, -1, S, 1)), -1)
        weights = scores.softmax(-1)
        y = (weights[..., :-1] if self.sink is not None else weights) @ v
        if self.gate is not None:
            y = y * self.gate(x).sigmoid().transpose(1, 2)[..., None]
        return self.merged(y)


class FullNorm(Attention):
    """Norms over the width of all heads: features have to be together."""

    def __init__(self) -> None:
        super().__init__()
        self.qn, self.kn = nn.RMSNorm(D), nn.LayerNorm(D)

    def heads_of(self, x: Tensor) -> tuple[Tensor, ...]:
        B, S, C = x.shape
        return tuple(t.view(B, S, H, C // H).transpose(1, 2) for t in (self.qn(self.q(x)), self.kn(self.k(x)), self.v(x)))


class Latent(nn.Module):
    """Low-rank queries, keys and values; one rotary key for all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qa, self.qb, self.qn = nn.Linear(D, 16), nn.Linear(16, H * 12), nn.RMSNorm(16)
        self.kva, self.kvb, self.kn = nn.Linear(D, 16 + 4), nn.Linear(16, H * 16), nn.RMSNorm(16)
        self.o = nn.Linear(H * 8, D)

    def forward(self, x: Tensor) -> Tensor:
        B, S, _ = x.shape
        q = self.qb(self.qn(self.qa(x))).view(B, S, H, 12).transpose(1, 2)
        c, rotary = self.kva(x).split((16, 4), -1)
        k, v = self.kvb(self.kn(c)).view(B, S, H, 16).transpose(1, 2).split((8, 8), -1)
        k = torch.cat((k, rotary[:, None].expand(B, H, S, 4)), -1)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, S, -1))


class Absorbed(nn.Module):
    """Latent attention on the latents themselves: the second weight of the keys and values is used as a matrix for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.a, self.b, self.o = (
            nn.Linear(D, H * 8),
            nn.Linear(D, 12),
            nn.Linear(12, H * 16, bias=False),
            nn.Linear(H * 8, D),
        )

    def forward(self, x: Tensor) -> Tensor:
        B, S, _ = x.shape
        latent, weights = self.a(x), self.b.weight.view(H, 16, 12)
        q = torch.einsum("bshd,hdc->bshc", self.q(x).view(B, S, H, 8), weights[:, :8])
        a = torch.einsum("bshc,btc->bsht", q, latent).softmax(-1)
        v = torch.einsum("bshc,hdc->bshd", torch.einsum("bsht,btc->bshc", a, latent), weights[:, -8:])
        return self.o(v.flatten(2))


class LearnedQuery(Attention):
    """One query, a parameter: what is computed from it meets the heads of each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Identity()
        self.query = nn.Parameter(torch.zeros(1, 1, D))

    def forward(self, x: Tensor) -> Tensor:
        B, S, C = x.shape
        _, k, v = self.heads_of(x)
        q = self.query.expand(B, -1, -1).reshape(B, 1, H, C // H).transpose(1, 2)
        return self.merged(F.scaled_dot_product_attention(q, k, v)).expand(B, S, C)


class Correlated(Attention):
    """Queries and keys are compared at all delays at once, as complex numbers."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads_of(x)
        delays = torch.fft.irfft(torch.fft.rfft(q, dim=2) * torch.conj(torch.fft.rfft(k, dim=2)), n=x.shape[1], dim=2)
        return self.merged(delays.softmax(2) * v)


class Checkpointed(nn.Module):
    """Wraps the forward of each subclass, as layers of transformers do."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        forward = cls.forward

        @functools.wraps(forward)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            return forward(self, *args, **kwargs)

        cls.forward = wrapped  # type: ignore[method-assign]


class Wrapped(Checkpointed):
    """What is known for each feature (its sizes too) stands beside split ones in the code of such a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 64), nn.Linear(64, D)
        self.register_buffer("scale", noise(64))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(torch.multiply(self.up(x), self.scale)))


class HeadList(nn.Module):
    """A module for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.ModuleList([nn.Linear(D, D // H) for _ in range(3)]) for _ in range(H)])
        self.proj = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q_k_v = [[f(x) for f in head] for head in self.heads]
        return self.proj(torch.cat([(q @ k.mT / 3).softmax(-1) @ v for q, k, v in q_k_v], -1))


class Talking(Attention):
    """Heads are mixed before and after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(H, H, bias=False), nn.Parameter(torch.zeros(H, H))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads_of(x)
        a = self.before((q @ k.mT / 3).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        return self.merged(torch.einsum("hg,bgst->bhst", self.after, a) @ v)


class Windows(Attention):
    """Each window attends to itself and the one before it, padded at the start."""

    def forward(self, x: Tensor) -> Tensor:
        B, S, C = x.shape
        q, k, v = (f(x).view(B, S // 4, 4, H, C // H).transpose(2, 3) for f in (self.q, self.k, self.v))
        k, v = (torch.cat((F.pad(t, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1], t), 3) for t in (k, v))
        return self.o(((q @ k.mT / 3).softmax(-1) @ v).transpose(2, 3).reshape(B, S, C))


class LowRank(nn.Module):
    """LoRA beside a frozen linear layer, or merged into its weight."""

    def __init__(self, merged: bool) -> None:
        super().__init__()
        self.base, self.merged = nn.Linear(D, D).requires_grad_(merged), merged
        self.a, self.b = nn.Parameter(torch.zeros(4, D)), nn.Parameter(torch.zeros(D, 4))

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.base.weight + self.b @ self.a, self.base.bias)
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


class LoraAttention(Attention):
    def __init__(self, merged: bool) -> None:
        super().__init__()
        self.q, self.v = LowRank(merged), LowRank(merged)


# ------------------------------------------------------------------------------------------------------------------ MLPs


class Gated(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.up, self.down, self.how = nn.Linear(D, 128), nn.Linear(64, D), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if self.how == "glu":
            return self.down(F.glu(y))
        a, b = {
            "chunk": lambda: y.chunk(2, -1),
            "interleaved": lambda: (y[..., ::2], y[..., 1::2]),
            "pairs": lambda: y.unflatten(-1, (64, 2)).unbind(-1),
        }[self.how]()
        return self.down(F.silu(a) * b)


class Experts(nn.Module):
    """A router and batched experts."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.router, self.how = nn.Linear(D, 4, bias=False), how
        self.up, self.down = nn.Parameter(torch.zeros(4, D, 64)), nn.Parameter(torch.zeros(4, 64, D))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        p = self.router(flat).softmax(-1)
        if self.how == "einsum":
            y = torch.einsum("etf,efd,te->td", F.gelu(torch.einsum("td,edf->etf", flat, self.up)), self.down, p)
        elif self.how == "bmm":
            y = (torch.bmm(F.gelu(torch.bmm(flat.expand(4, -1, -1), self.up)), self.down) * p.t()[..., None]).sum(0)
        else:  # each expert on its tokens; some may get none
            weights, chosen = p.topk(2, -1)
            y = torch.zeros_like(flat)
            for e in range(4):
                token, slot = torch.where(chosen == e)
                y.index_add_(0, token, (F.gelu(flat[token] @ self.up[e]) @ self.down[e]) * weights[token, slot, None])
        return y.view_as(x)


class StackedExperts(nn.Module):
    """All experts' weights in one, one below the other."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.up, self.down = (
            nn.Linear(D, 4),
            nn.Parameter(torch.zeros(4 * 64, D)),
            nn.Parameter(torch.zeros(4 * 64, D)),
        )

    def forward(self, x: Tensor) -> Tensor:
        p = self.router(x).softmax(-1)
        up, down = self.up.view(4, 64, D), self.down.view(4, 64, D)
        return sum(F.gelu(x @ up[e].t()) @ down[e] * p[..., e, None] for e in range(4))  # type: ignore[return-value]


class Depthwise(nn.Module):
    """A convolution along the tokens, of each feature by itself, between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.conv, self.down = nn.Linear(D, 64), nn.Conv1d(64, 64, 3, padding=1, groups=64), nn.Linear(64, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.conv(self.up(x).mT).mT))


class ConvMLP(nn.Module):
    """Convolutions along the tokens as the layers of an MLP: of one token, or of neighbors; groups, and one filter for each channel."""

    def __init__(self, kernel: int = 1, groups: int = 1, filters: bool = False) -> None:
        super().__init__()
        pad = kernel // 2
        self.up = nn.Conv1d(D, 64, kernel, padding=pad, groups=groups)
        self.filter = nn.Conv1d(64, 128, 3, padding=1, groups=64) if filters else nn.Identity()
        self.down = nn.Conv1d(128 if filters else 64, D, kernel, padding=pad, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.filter(self.up(x.mT)))).mT


class ConvAttention(Attention):
    """Convolutions of one token as projections, of whole channels or of groups of them."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv1d(D, D, 1, groups=groups) for _ in range(3))
        self.o = nn.Conv1d(D, D, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, S, _ = x.shape
        q, k, v = (f(x.mT).view(B, self.heads, D // self.heads, S) for f in (self.q, self.k, self.v))
        scores = (q.mT @ k / (D // self.heads) ** 0.5).softmax(-1)
        return self.o((v @ scores.mT).reshape(B, D, S)).mT


# ---------------------------------------------------------------------------------------------------------------- models


class ConvPictures(nn.Module):
    """Pictures all the way: a feed-forward part with a filter for each channel, then layers that read what convolutions make."""

    def __init__(self, out: int = 80) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, D, 2, 2)
        self.up, self.filter, self.down = nn.Conv2d(D, 64, 1), nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.Conv2d(64, D, 1)
        self.wider, self.groups, self.larger = (
            nn.Conv2d(D, 64, 3),
            nn.Conv2d(64, 128, 1, groups=4),
            nn.ConvTranspose2d(128, D, 2, 2),
        )
        self.last, self.read = nn.Conv2d(D, 64, 1), nn.Linear(64, D)
        self.head = nn.Conv2d(D, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.down(F.gelu(self.filter(self.up(x))))
        x = self.larger(F.gelu(self.groups(F.gelu(self.wider(x)))))
        x = self.read(F.relu(self.last(x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(x)


class Scan(nn.Module):
    """A state-space block: one projection mixes all channels, its outputs are needed by all."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.mix = nn.Linear(D, 2 * D), nn.Linear(D, 4 + 8 + 8)
        self.step, self.out, self.decay = nn.Linear(4, D), nn.Linear(D, D), nn.Parameter(torch.zeros(D, 8))

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.inner(x).chunk(2, -1)
        step, b, c = self.mix(u).split((4, 8, 8), -1)
        step, state, ys = F.softplus(self.step(step)), x.new_zeros(x.shape[0], D, 8), []
        for t in range(x.shape[1]):
            state = state * torch.exp(-step[:, t, :, None] * self.decay.exp()) + (step * u)[:, t, :, None] * b[:, t, None]
            ys.append((state * c[:, t, None]).sum(-1))
        return self.out(torch.stack(ys, 1) * F.silu(gate))


class SequenceFirst(nn.Module):
    """(S, B, D), heads folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        S, B, _ = x.shape
        q, k, v = (t.reshape(S, B * H, D // H).transpose(0, 1) for t in self.qkv(x).view(S, B, H, 3 * D // H).chunk(3, -1))
        a = torch.baddbmm(torch.zeros(B * H, S, S), q, k.mT, beta=0.0, alpha=0.3).softmax(-1)
        return self.o(torch.bmm(a, v).transpose(0, 1).reshape(S, B, D)).transpose(0, 1)


class Flat(LM):
    """Tokens of all sequences behind each other; the loss inside."""

    def forward(self, tokens: Tensor) -> Any:
        B, S = tokens.shape
        x = self.emb(tokens.view(-1))
        for block in self.blocks:
            x = x + block.attention(block.n1(x).view(B, S, D)).view(B * S, D)
            x = x + block.mlp(block.n2(x))
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits[:-1], tokens.view(-1)[1:]), logits


class Losses(LM):
    """Other losses than the cross entropy, inside the model."""

    def __init__(self, how: str, tied: bool = False) -> None:
        super().__init__([Block(Attention())], tied=tied)
        self.how = how

    def forward(self, tokens: Tensor) -> Any:
        z, t = super().forward(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        if self.how == "nll":
            return F.nll_loss(z.log_softmax(-1), t)
        if self.how == "gather":
            return (z.logsumexp(-1) - z.gather(-1, t[:, None]).squeeze(-1)).mean()
        return F.cross_entropy(30 * torch.tanh(z / 30), t, label_smoothing=0.1) + 1e-3 * z.logsumexp(-1).pow(2).mean()


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


class Returns(LM):
    def forward(self, tokens: Tensor) -> Any:
        hidden = self.hidden(tokens)
        return Output(self.head(hidden), hidden)


class RawTable(nn.Module):
    """A tied table that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.bias, self.block = nn.Parameter(torch.zeros(V, D)), nn.Parameter(torch.zeros(V)), Block(Attention())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.block(self.table[tokens]) @ self.table.T + self.bias


class Twice(nn.Module):
    """One encoder on two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.classifier = LM([Block(Attention())]), nn.Linear(3 * D, 3)
        self.encoder.head = nn.Identity()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        u, v = self.encoder(a).mean(1), self.encoder(b)[:, 0]
        return self.classifier(torch.cat((u, v, u * v), -1))


class Residual(nn.Module):
    """Values of the first layer in all; scalars that meet shards and whole activations."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.layers = nn.Embedding(V, D), nn.ModuleList([Attention() for _ in range(3)])
        self.share, self.head = nn.Parameter(torch.zeros(3)), nn.Linear(D, V)

    def forward(self, tokens: Tensor) -> Tensor:
        x, first = self.emb(tokens), None
        for layer, share in zip(self.layers, self.share):
            q, k, v = layer.heads_of(x)
            first = v if first is None else first
            x = x * share + layer.merged(F.scaled_dot_product_attention(q, k, share * v + (1 - share) * first))
        return self.head(x)


class Pictures(nn.Module):
    """Patches, a class token, windows that roll; a small classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.cls = nn.Conv2d(3, D, 2, 2), nn.Parameter(torch.zeros(1, 1, D))
        self.local, self.block, self.head = Attention(), Block(Attention()), nn.Linear(D, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.roll(self.patch(x).permute(0, 2, 3, 1), (-2, -2), (1, 2))
        B, R, C, _ = x.shape
        w = x.view(B, R // 4, 4, C // 4, 4, D).transpose(2, 3).reshape(-1, 16, D)
        x = (w + self.local(w)).view(B, R // 4, C // 4, 4, 4, D).transpose(2, 3).reshape(B, R * C, D)
        return self.head(self.block(torch.cat((self.cls.expand(B, -1, -1), x), 1))[:, 0])


class Pyramid(nn.Module):
    """Stages of growing width: the first has one group of features, of which ranks can have no share; of the others' they can."""

    def __init__(self) -> None:
        super().__init__()
        widths = (16, 32, 64)
        self.up, self.down = (nn.ModuleList(nn.Linear(*((d, 2 * d)[::way])) for d in widths) for way in (1, -1))
        self.merge = nn.ModuleList(nn.Linear(a, b) for a, b in zip((12, *widths), widths, strict=False))

    def forward(self, x: Tensor) -> Tensor:
        for merge, up, down in zip(self.merge, self.up, self.down, strict=True):
            x = merge(x)
            groups = up(x).unflatten(-1, (x.shape[-1] // 16, -1)).softmax(-1)
            x = x + down(groups.flatten(2))
        return x


class Shown(nn.Module):
    """Returns features that a further layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.wide, self.out = Block(Attention()), nn.Linear(D, 256), nn.Linear(256, D)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.wide(self.block(x))
        return {"features": features, "y": self.out(features)}


class MoreKeys(nn.Module):
    """Attention to keys that are parameters, and to a key of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, H, add_bias_kv=True, add_zero_attn=True, batch_first=True)
        self.mlp = MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.mlp(x)


class Functional(nn.Module):
    """Code that calls torch's attention as a function, with a bias for each head; weights apart, or in one."""

    def __init__(self, packed: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.qkv = nn.Linear(D, 3 * D) if packed else None
        if packed:
            del self.q, self.k, self.v
        self.scale, self.mlp = nn.Parameter(torch.ones(H, 1, 1)), MLP()

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        y = x.transpose(0, 1)
        if self.qkv is not None:
            of: dict[str, Any] = {"in_proj_weight": self.qkv.weight, "in_proj_bias": self.qkv.bias}
        else:
            of = {"in_proj_weight": None, "in_proj_bias": torch.cat((self.q.bias, self.k.bias, self.v.bias))}
            of |= {f"{n}_proj_weight": getattr(self, n).weight for n in "qkv"} | {"use_separate_proj_weight": True}
        rest: dict[str, Any] = {"bias_k": None, "bias_v": None, "add_zero_attn": False, "dropout_p": 0.0}
        rest |= {
            "out_proj_weight": self.o.weight,
            "out_proj_bias": self.o.bias,
            "attn_mask": (self.scale * bias).repeat(len(x), 1, 1),
        }
        y, weights = F.multi_head_attention_forward(y, y, y, embed_dim_to_check=D, num_heads=H, **of, **rest)
        x = x + y.transpose(0, 1)
        return x + self.mlp(x) * weights.mean()


class Modulated(nn.Module):
    """DiT: scales, shifts and gates from a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out, self.condition = nn.Linear(6, D), nn.Linear(D, 6), nn.Linear(8, D)
        self.ada, self.attention, self.mlp = nn.Linear(D, 6 * D), Attention(), MLP()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.inp(x)
        s1, g1, b1, s2, g2, b2 = self.ada(F.silu(self.condition(t)))[:, None].chunk(6, -1)
        x = x + g1 * self.attention(F.layer_norm(x, (D,)) * (1 + s1) + b1)
        return self.out(x + g2 * self.mlp(F.layer_norm(x, (D,)) * (1 + s2) + b2))


class Fourier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft2(x, dim=(-2, -1)).real / math.sqrt(x.shape[1] * D)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(D, D, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


lm("plain")
lm("tied", tied=True)
for how in ("split", "slices", "part_first", "head_first", "part_last"):
    lm(f"fused_{how}", lambda how=how: Fused(how))
for how in ("repeat", "expand", "grouped", "native"):
    lm(f"gqa_{how}", lambda how=how: Grouped(2, how))
for how in ("repeat", "grouped"):
    lm(f"mqa_{how}", lambda how=how: Grouped(1, how))
lm("fused_mqa", FusedMQA)
lm("per_head_einsum", PerHead)
lm("own_conv1d", OwnConv1D)
lm("mha", TorchAttention)
lm("mha_one_head", lambda: TorchAttention(need_weights=False, heads=1))  # values are split, queries and keys on every rank
lm("experts_stacked", mlp=StackedExperts, held=0.8)
lm("mha_without_weights", lambda: TorchAttention(need_weights=False))
lm("mha_sequence_first", lambda: TorchAttention(batch_first=False))
lm("mha_cross", lambda: TorchAttention(cross=True))
lm("mha_extra_keys", lambda: TorchAttention(add_bias_kv=True))
for how in ("alibi", "table", "sinks", "null", "prefix", "norm", "gate"):
    lm(f"scores_{how}", lambda how=how: Biased(how))
lm("full_width_norm", FullNorm)
lm("latent", Latent)
lm("latent_absorbed", Absorbed, held=0.55)
lm("learned_query", LearnedQuery)
lm("correlated", Correlated)
lm("wrapped_forward", mlp=Wrapped, held=0.55)
lm("head_list", HeadList)
lm("talking_heads", Talking)
lm("windows", Windows)
lm("lora", lambda: LoraAttention(merged=False))
lm("lora_merged", lambda: LoraAttention(merged=True))
for how in ("glu", "chunk", "interleaved", "pairs"):
    lm(f"gated_{how}", mlp=lambda how=how: Gated(how))
for how in ("einsum", "bmm", "loop"):
    lm(f"experts_{how}", mlp=lambda how=how: Experts(how), held=0.8)
lm("depthwise", mlp=Depthwise, held=0.55)
lm("conv_mlp", mlp=ConvMLP, held=0.55)
lm("conv_mlp_of_neighbors", mlp=lambda: ConvMLP(3), held=0.55)
lm("conv_mlp_in_groups", mlp=lambda: ConvMLP(1, 4), held=0.58)
lm("conv_mlp_with_filters", mlp=lambda: ConvMLP(1, filters=True), held=0.55)
lm("conv_attention", ConvAttention, held=0.55)
lm("conv_attention_in_groups", lambda: ConvAttention(4), held=0.55)
lm("scan", Scan, held=0.8)
lm("sequence_first", SequenceFirst)
lm("fourier", Fourier)
lm("recurrent", Recurrent, held=0.8)
lm("small_vocabulary", vocab=40, tied=True)


class Convolutions(nn.Sequential):
    """Nothing for tensor parallelism here: right all the same."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def _shared_layer() -> Built:
    tokens, block = ids(), Block(Attention())
    return LM([block, block, block]), {"tokens": tokens}, lambda out: next_token(out, tokens)


def _flat() -> Built:
    return Flat([Block(Attention())]), {"tokens": ids()}, lambda out: out[0]


def _returns() -> Built:
    tokens = ids()
    return Returns([Block(Attention())]), {"tokens": tokens}, lambda out: next_token(out.logits, tokens) + weighted(out.hidden)


def _raw_table() -> Built:
    tokens = ids()
    return RawTable(), {"tokens": tokens}, lambda out: next_token(out, tokens)


def _residual() -> Built:
    tokens = ids()
    return Residual(), {"tokens": tokens}, lambda out: next_token(out, tokens)


def _torch_decoder() -> Built:
    layer = nn.TransformerDecoderLayer(D, H, 64, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerDecoder(layer, 2), {"tgt": noise(2, 5, D), "memory": noise(2, 7, D, seed=4)}, weighted


def _torch_encoder() -> Built:
    layer = nn.TransformerEncoderLayer(D, H, 64, dropout=0.0)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    return nn.TransformerEncoder(layer, 2), {"src": noise(6, 2, D), "src_key_padding_mask": padding}, weighted


def _torch_unbatched() -> Built:
    layer = nn.TransformerEncoderLayer(D, H, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), {"src": noise(6, D)}, weighted


case("shared_layer", _shared_layer)
case(
    "convolutions",
    lambda: (Convolutions(), {"x": noise(2, 3, 8, 8)}, lambda out: F.cross_entropy(out, torch.tensor([0, 3]))),
    held=1.0,
)
case("flat_tokens", _flat)
case("returns_dataclass", _returns)
case("raw_table", _raw_table, held=1.0)
case("residual_values", _residual)
case("torch_decoder", _torch_decoder)
case("torch_encoder", _torch_encoder)
case("torch_unbatched", _torch_unbatched)
case("twice", lambda: (Twice(), {"a": ids(3, 9), "b": ids(3, 7)}, lambda out: F.cross_entropy(out, torch.tensor([0, 2, 1]))))
case("pictures", lambda: (Pictures(), {"x": noise(2, 3, 8, 8)}, lambda out: F.cross_entropy(out, torch.tensor([0, 3]))))
case("conv_pictures", lambda: (ConvPictures(), {"x": noise(2, 3, 12, 12)}, weighted), held=0.66)
case("conv_pictures_large_output", lambda: (ConvPictures(301), {"x": noise(2, 3, 12, 12)}, weighted), held=0.55)
case("pyramid", lambda: (Pyramid(), {"x": noise(2, 9, 12)}, weighted), held=0.6)
case("shown", lambda: (Shown(), {"x": noise(2, 5, D)}, lambda out: weighted(out["features"]) + weighted(out["y"])), held=0.6)
case("more_keys", lambda: (MoreKeys(), {"x": noise(2, 5, D)}, weighted))
case("functional", lambda: (Functional(), {"x": noise(2, 5, D), "bias": noise(H, 5, 5)}, weighted))
case("functional_packed", lambda: (Functional(packed=True), {"x": noise(2, 5, D), "bias": noise(H, 5, 5)}, weighted))
case("modulated", lambda: (Modulated(), {"x": noise(2, 5, 6), "t": noise(2, 8)}, weighted))
for how in ("nll", "gather", "smooth"):
    case(f"loss_{how}", lambda how=how: (Losses(how, tied=how == "gather"), {"tokens": ids()}, lambda out: out))


# ------------------------------------------------------------------------------------------------- transformers' models

_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_DECODER = {
    **{"vocab_size": V, "hidden_size": D, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": H},
    **{"num_key_value_heads": 2, "max_position_embeddings": 32, **_SPECIAL},
}
_GPT2 = {
    "vocab_size": V,
    "n_positions": 32,
    "n_embd": D,
    "n_layer": 2,
    "n_head": H,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_BERT = {**_DECODER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_BART = {
    **{
        "vocab_size": V,
        "d_model": D,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": H,
        "decoder_attention_heads": H,
    },
    **{
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 32,
        "dropout": 0.0,
        "decoder_start_token_id": 2,
        **_SPECIAL,
    },
}
_T5 = {
    **{"vocab_size": V, "d_model": D, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": H, "relative_attention_num_buckets": 8},
    **{"dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2},
}
_LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
    "num_key_value_heads": H,
}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("AutoModelForCausalLM", "llama", _DECODER),
    "qwen2": ("AutoModelForCausalLM", "qwen2", {**_DECODER, "tie_word_embeddings": True}),
    "olmo2": ("AutoModelForCausalLM", "olmo2", _DECODER),
    "phi3": ("AutoModelForCausalLM", "phi3", _DECODER),
    "mixtral": ("AutoModelForCausalLM", "mixtral", {**_DECODER, **_EXPERTS}),
    "deepseek_v3": (
        "AutoModelForCausalLM",
        "deepseek_v3",
        {**_DECODER, **_EXPERTS, **_LATENT, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    "gpt_neox": ("AutoModelForCausalLM", "gpt_neox", _DECODER),
    "bloom": ("AutoModelForCausalLM", "bloom", {"vocab_size": V, "hidden_size": D, "n_layer": 2, "n_head": H, **_SPECIAL}),
    "falcon": ("AutoModelForCausalLM", "falcon", {**_DECODER, "multi_query": True}),
    "gpt2": ("AutoModelForCausalLM", "gpt2", _GPT2),
    "mamba": (
        "AutoModelForCausalLM",
        "mamba",
        {"vocab_size": V, "hidden_size": D, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 4, **_SPECIAL},
    ),
    "bert": ("AutoModelForMaskedLM", "bert", _BERT),
    "bart": ("AutoModelForSeq2SeqLM", "bart", _BART),
    "t5": ("AutoModelForSeq2SeqLM", "t5", _T5),
}


def _transformers(cls: str, kind: str, config: dict[str, Any]) -> Built:
    import transformers

    made = getattr(transformers, cls).from_config(transformers.AutoConfig.for_model(kind, **config))
    return made, {"input_ids": ids(), "labels": ids(seed=5)}, lambda out: out.loss


if importlib.util.find_spec("transformers") is not None:
    for _name, _config in _CONFIGS.items():
        case(f"hf_{_name}", lambda config=_config: _transformers(*config), held=0.8 if _name == "mamba" else 0.66)
