"""A Llama in plain PyTorch that does not know about ranks: RMSNorm, rotary embeddings, grouped-query attention, SwiGLU.

The only requirement: heads are counted by `-1`, so that the code is also right on a rank that holds only some of them.

Shapes in the margin: B batch, T tokens, D width, H heads, K key/value heads, F width of a head, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# How it is sharded, for those who prefer to write it down. A weight that no rule covers is an error.
PLAN = {
    "tok_embeddings": "vocab_embedding",
    "layers.*.attention_norm": "sequence",
    "layers.*.attention.wq": "colwise",
    "layers.*.attention.wk": "colwise",
    "layers.*.attention.wv": "colwise",
    "layers.*.attention.wo": "rowwise",
    "layers.*.ffn_norm": "sequence",
    "layers.*.feed_forward.w1": "colwise",
    "layers.*.feed_forward.w3": "colwise",
    "layers.*.feed_forward.w2": "rowwise",
    "norm": "sequence",
    "output": "vocab_head",
}


@dataclass
class LlamaConfig:
    vocab_size: int = 512
    dim: int = 128
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 4
    hidden_dim: int = 344
    max_seq_len: int = 256
    bias: bool = False
    tied: bool = False


class Attention(nn.Module):
    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = c.dim // c.num_heads
        self.wq = nn.Linear(c.dim, c.num_heads * self.head_dim, bias=c.bias)
        self.wk = nn.Linear(c.dim, c.num_kv_heads * self.head_dim, bias=c.bias)
        self.wv = nn.Linear(c.dim, c.num_kv_heads * self.head_dim, bias=c.bias)
        self.wo = nn.Linear(c.num_heads * self.head_dim, c.dim, bias=c.bias)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        B, T, _ = x.shape
        q = rotate(self.wq(x).view(B, T, -1, self.head_dim), rope).transpose(1, 2)  # (B, H, T, F)
        k = rotate(self.wk(x).view(B, T, -1, self.head_dim), rope).transpose(1, 2)  # (B, K, T, F)
        v = self.wv(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, F)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # (B, H, T, F)
        return self.wo(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


class FeedForward(nn.Module):
    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(c.dim, c.hidden_dim, bias=c.bias)
        self.w2 = nn.Linear(c.hidden_dim, c.dim, bias=c.bias)
        self.w3 = nn.Linear(c.dim, c.hidden_dim, bias=c.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(c.dim, eps=1e-5)
        self.attention = Attention(c)
        self.ffn_norm = nn.RMSNorm(c.dim, eps=1e-5)
        self.feed_forward = FeedForward(c)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """Tokens (B, T) to logits (B, T, V)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.output.weight = self.tok_embeddings.weight
        self.register_buffer("rope", rope_table(config.dim // config.num_heads, config.max_seq_len), persistent=False)
        self.apply(init_weights)

    def forward(self, tokens: Tensor) -> Tensor:
        rope = self.rope[: tokens.shape[1]]
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, rope)
        return self.output(self.norm(x))


def init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


def rope_table(head_dim: int, length: int, base: float = 10000.0) -> Tensor:
    """(length, 2, head_dim): cosines and sines of the rotary position embedding (Su et al. 2021), halves repeated."""
    angles = torch.outer(torch.arange(length), base ** (-torch.arange(0, head_dim, 2) / head_dim)).repeat(1, 2)
    return torch.stack((angles.cos(), angles.sin()), 1)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    cos, sin = rope[:, None, 0], rope[:, None, 1]  # (T, 1, F)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class LlamaModule(L.LightningModule):
    """Next-token training of a Llama; batches are {"tokens": (B, T), "targets": (B, T)}."""

    def __init__(self, config: LlamaConfig, lr: float = 3e-4) -> None:
        super().__init__()
        self.model = Llama(config)
        self.lr = lr

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True, sync_dist=True)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)
