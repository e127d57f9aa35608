"""Models with dropout and other random numbers in them, for the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tp.styles import Colwise

DIM, HEADS, VOCAB = 32, 4, 23


class Attention(nn.Module):
    """Three ways to drop attention weights."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.weights_dropout, self.out_dropout = nn.Dropout(0.3), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, DIM // HEADS)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.how == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.3 if self.training else 0.0)
        else:
            weights = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, -1)
            weights = self.weights_dropout(weights) if self.how == "module" else F.dropout(weights, 0.3, self.training)
            y = weights @ v
        return self.out_dropout(self.o(y.transpose(1, 2).flatten(2)))


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 0.7 + torch.rand((x.shape[0], *(1 for _ in x.shape[1:])), dtype=x.dtype, device=x.device)
        return x.div(0.7) * keep.floor()


class Block(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(DIM), Attention(how), nn.LayerNorm(DIM)
        self.up, self.down, self.inner, self.path = nn.Linear(DIM, 50), nn.Linear(50, DIM), nn.Dropout(0.3), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.path(self.attention(self.norm1(x)))
        y = self.down(self.inner(F.gelu(self.up(self.norm2(x)))))
        return x + self.path(F.dropout(y, 0.3, self.training))  # in the block's own code


class Net(nn.Module):
    def __init__(self, how: str = "sdpa") -> None:
        super().__init__()
        self.embed, self.drop, self.head = nn.Embedding(VOCAB, DIM), nn.Dropout(0.3), nn.Linear(DIM, VOCAB)
        self.blocks = nn.Sequential(Block(how), Block(how))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.drop(self.embed(tokens))))


def plan(sequence: bool) -> dict[str, Any]:
    return {
        "embed": "vocab_embedding",
        "blocks.*.norm*": "sequence" if sequence else "replicate",
        **{f"blocks.*.attention.{name}": Colwise(heads=HEADS) for name in "qkv"},
        "blocks.*.attention.o": "rowwise",
        "blocks.*.up": "colwise",
        "blocks.*.down": "rowwise",
        "head": "vocab_head",
    }


def batch(seed: int, length: int = 10) -> Tensor:
    return torch.randint(0, VOCAB, (3, length), generator=torch.Generator().manual_seed(seed))


def steps(model: nn.Module, seeds: tuple[int, ...] = (0, 1, 2, 3)) -> list[float]:
    """A few steps of SGD, on batches of several lengths; step 3 is one that nobody observes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for seed in seeds:
        tokens = batch(seed, 9 + seed)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
