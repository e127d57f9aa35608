"""Models whose measurements were published, written as their authors' code computes: same shapes, same kernels, no more.

What counts for an estimate is what is kept and moved: rotary positions in float32 or not, norms of one kernel or of five, biases,
which projections are one. Heads are counted by `-1`, so that a rank may hold some of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """A model: `kind` "gpt" (LayerNorm, GELU, learned positions, tied) or "llama" (RMSNorm, SwiGLU, rotary positions, grouped queries)."""

    kind: str
    width: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int
    tied: bool = False
    lora: int = 0  # rank of the adapters of queries and values; everything else is frozen then


def gpt(width: int, layers: int, heads: int, vocab: int = 50368) -> Size:
    return Size("gpt", width, layers, heads, heads, 4 * width, vocab)


MODELS = {
    "MPT 125M": gpt(768, 12, 12),
    "MPT 350M": gpt(1024, 24, 16),
    "MPT 760M": gpt(1536, 24, 12),
    "MPT 1B": gpt(2048, 24, 16),
    "MPT 3B": gpt(2560, 32, 20),
    "MPT 7B": gpt(4096, 32, 32),
    "MPT 13B": gpt(5120, 40, 40),
    "MPT 30B": gpt(7168, 48, 56),
    "MPT 70B": gpt(8192, 80, 64),
    "Llama 2 7B": Size("llama", 4096, 32, 32, 32, 11008, 32000),
    "Llama 2 13B": Size("llama", 5120, 40, 40, 40, 13824, 32000),
    "Llama 2 34B": Size("llama", 8192, 48, 64, 8, 22016, 32000),
    "Llama 2 70B": Size("llama", 8192, 80, 64, 8, 28672, 32000),
    "Llama 3 8B": Size("llama", 4096, 32, 32, 8, 14336, 128256),
    "Llama 3 70B": Size("llama", 8192, 80, 64, 8, 28672, 128256),
    "Llama 3.2 3B": Size("llama", 3072, 28, 24, 8, 8192, 128256, tied=True),
    "Llama 2 7B, LoRA": Size("llama", 4096, 32, 32, 32, 11008, 32000, lora=8),
    "Llama 2 13B, LoRA": Size("llama", 5120, 40, 40, 40, 13824, 32000, lora=8),
    "Llama 3 405B": Size("llama", 16384, 126, 128, 8, 53248, 128256),
}


class LowPrecisionNorm(nn.LayerNorm):
    """LayerNorm in the dtype of its input, also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return torch.native_layer_norm(x, self.normalized_shape, weight, bias, self.eps)[0]


class UnfusedNorm(nn.Module):
    """RMSNorm operation by operation, in float32 (what `nn.RMSNorm` ran as on CUDA before it had a kernel of its own)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt((y * y).mean(-1, keepdim=True) + 1e-5)).type_as(x) * self.weight


class GPTBlock(nn.Module):
    def __init__(self, s: Size) -> None:
        super().__init__()
        self.d = s.width // s.heads
        self.norm_1, self.norm_2 = LowPrecisionNorm(s.width), LowPrecisionNorm(s.width)
        self.q, self.k, self.v = (nn.Linear(s.width, s.width) for _ in range(3))
        self.out = nn.Linear(s.width, s.width)
        self.up, self.down = nn.Linear(s.width, s.inner), nn.Linear(s.inner, s.width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = self.norm_1(x)
        q, k, v = (p(y).view(b, t, -1, self.d).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, -1)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    """Tokens (B, T) to logits (B, T, V), with the embedding's weight for the head."""

    def __init__(self, s: Size, seq: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(s.vocab, s.width), nn.Embedding(seq, s.width)
        self.blocks = nn.ModuleList(GPTBlock(s) for _ in range(s.layers))
        self.norm = LowPrecisionNorm(s.width)
        self.head = nn.Linear(s.width, s.vocab, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class LlamaBlock(nn.Module):
    def __init__(self, s: Size) -> None:
        super().__init__()
        self.d, self.groups = s.width // s.heads, s.heads // s.kv_heads
        self.norm_1, self.norm_2 = UnfusedNorm(s.width), UnfusedNorm(s.width)
        adapted = partial(LoRA, s.lora) if s.lora else partial(nn.Linear, bias=False)
        self.q, self.v = adapted(s.width, s.width), adapted(s.width, s.kv_heads * self.d)
        self.k = nn.Linear(s.width, s.kv_heads * self.d, bias=False)
        self.out = nn.Linear(s.width, s.width, bias=False)
        self.gate, self.up = (nn.Linear(s.width, s.inner, bias=False) for _ in range(2))
        self.down = nn.Linear(s.inner, s.width, bias=False)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = self.norm_1(x)
        q, k, v = (p(y).view(b, t, -1, self.d) for p in (self.q, self.k, self.v))
        q, k = rotate(q, turn), rotate(k, turn)
        if self.groups > 1:
            k, v = (z.unsqueeze(3).expand(b, t, -1, self.groups, self.d).flatten(2, 3) for z in (k, v))
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, -1)
        x = x + self.out(y)
        y = self.norm_2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class LoRA(nn.Module):
    """A linear layer and a low-rank one beside it (Hu et al. 2021), with dropout before that."""

    def __init__(self, rank: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.base = nn.Linear(d_in, d_out, bias=False)
        self.down, self.up = nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(F.dropout(x, 0.05, self.training))) * 2.0


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """(B, T, H, D), as complex float32 numbers (Su et al. 2021)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn[:, None]).flatten(3).type_as(x)


class Llama(nn.Module):
    """Tokens (B, T) to logits (B, T, V)."""

    def __init__(self, s: Size, seq: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(s.vocab, s.width)
        self.blocks = nn.ModuleList(LlamaBlock(s) for _ in range(s.layers))
        self.norm = UnfusedNorm(s.width)
        self.head = nn.Linear(s.width, s.vocab, bias=False)
        if s.tied:
            self.head.weight = self.tokens.weight
        if s.lora:
            for name, p in self.named_parameters():
                p.requires_grad = (".q." in name or ".v." in name) and ".base." not in name
        self.register_buffer("turn", torch.ones(seq, s.width // s.heads // 2, dtype=torch.complex64), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x, self.turn)
        return self.head(self.norm(x))


def build(name: str, seq: int) -> nn.Module:
    """A model of `MODELS` on the meta device, for sequences of this length."""
    size = MODELS[name]
    with torch.device("meta"):
        return GPT(size, seq) if size.kind == "gpt" else Llama(size, seq)
