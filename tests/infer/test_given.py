"""Plans that somebody wrote: wrong ones are doubted, with the module and the remedy; right ones are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tp.infer.given import doubt_about
from lightning_tp.plan.plan import Plan


class Attention(nn.Module):
    """`heads` is what `view` is given: -1, or the number of all heads."""

    def __init__(self, heads: int = -1, tokens: int | None = None) -> None:
        super().__init__()
        self.heads, self.tokens = heads, tokens
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, self.tokens or t, self.heads, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))


class Fused(nn.Module):
    def __init__(self, gated: bool = True) -> None:
        super().__init__()
        self.gated, self.up, self.down = gated, nn.Linear(16, 64), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Mlp(nn.Module):
    def __init__(self, between: Any = F.gelu) -> None:
        super().__init__()
        self.between, self.up, self.down = between, nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.between(self.up(x)))


QKV = {**dict.fromkeys("qkv", "colwise"), "o": "rowwise"}
PAIR = {"up": "colwise", "down": "rowwise"}
RIGHT: dict[str, tuple[nn.Module, dict[str, Any]]] = {
    "attention": (Attention(), QKV),
    "gathered": (
        Attention(4),
        {**{key: {"style": "colwise", "output": "I"} for key in "qkv"}, "o": {"style": "rowwise", "input": "I"}},
    ),
    "fused": (Fused(), {"up": {"style": "fused_colwise", "parts": 2}, "down": "rowwise"}),
    "mlp": (Mlp(), PAIR),
    "one of two": (nn.Sequential(Mlp(), Mlp()), {"0.up": "colwise", "0.down": "rowwise", "1": "replicate"}),
}
WRONG: dict[str, tuple[nn.Module, dict[str, Any], str, str]] = {
    "fused as colwise": (Fused(), PAIR, "up", "lie on several ranks.*`fused_colwise` with their `parts`"),
    "number of heads": (Attention(4), QKV, "", "does not run on shards.*number of heads"),
    "silent view": (Attention(4, tokens=-1), QKV, "", "calls `view` with sizes of full tensors.*Write `-1`"),
    "a key that is whole": (Attention(), {**QKV, "k": "replicate"}, "", "does not run on shards"),
    "no second half": (Mlp(), {"up": "colwise", "down": "replicate"}, "down", "does not run on shards.*not `rowwise`"),
    "swapped": (Mlp(), {"up": "rowwise", "down": "colwise"}, "up", "does not run on shards.*order of the two swapped"),
    "softmax": (Mlp(lambda x: x.softmax(-1)), PAIR, "up", r"`softmax` in `the model`|lie on several ranks"),
    "other parts": (Fused(), {"up": {"style": "fused_colwise", "parts": 4}, "down": "rowwise"}, "down", "compare `parts`"),
}


def doubt(model: nn.Module, rules: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return doubt_about(model, lambda m, x: m(x).square().mean(), torch.randn(2, 6, 16), Plan(rules), 2)


@pytest.mark.parametrize("kind", RIGHT)
def test_right_plans(kind: str) -> None:
    assert doubt(*RIGHT[kind]) is None


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_plans(kind: str) -> None:
    import re

    model, rules, module, text = WRONG[kind]
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = doubt(model, rules)
    assert found is not None and re.search(text, str(found)) and found.module == module, found
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
