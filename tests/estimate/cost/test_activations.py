"""Saved activations: the formulas of Korthikanti et al. 2022 (arXiv 2205.05198, section 4), for a layer of a GPT in 16 bits; and by category."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tp.estimate import estimate
from lightning_tp.estimate.cost.activations import live_segments
from lightning_tp.estimate.rank.inputs import loss_of
from lightning_tp.estimate.rank.settings import Settings
from lightning_tp.estimate.rank.trace_step import trace_step
from lightning_tp.estimate.trace.step_trace import Alloc, End, Label, Tape
from lightning_tp.plan.plan import Plan
from tests.estimate.by_hand import model_of, op

S, B, H, A = 256, 3, 512, 8


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(H), nn.LayerNorm(H)
        self.q, self.k, self.v, self.o = (nn.Linear(H, H) for _ in range(4))
        self.up, self.down = nn.Linear(H, 4 * H), nn.Linear(4 * H, H)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(2, (-1, H // A)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = F.softmax(q @ (k.transpose(2, 3) / math.sqrt(H // A)), -1)
            y = F.dropout(scores, 0.1, self.training) @ v
        x = x + F.dropout(self.o(y.transpose(1, 2).flatten(2)), 0.1, self.training)
        y = self.down(F.gelu(self.up(self.norm2(x))))
        return x + F.dropout(y, 0.1, self.training)

    fused = False


class FusedLayer(Layer):
    fused = True


class GPT(nn.Module):
    def __init__(self, layers: int, layer: type[Layer]) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, H)
        self.layers = nn.ModuleList(layer() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(H), nn.Linear(H, 64)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def of_a_layer(layer: type[Layer] = Layer, tp: int = 1, **options: object) -> float:
    """Bytes that one layer in the middle keeps, in units of s b h."""
    kept = []
    for layers in (8, 9):
        with torch.device("meta"):
            model = GPT(layers, layer)
        ids = torch.zeros(B, S, dtype=torch.int64)
        found = estimate(model, (ids,), (1, tp), precision="bf16-true", **options)  # type: ignore[arg-type]
        kept.append(sum(found.memory.activations.values()))
    return (kept[1] - kept[0]) / (S * B * H)


SCORES = 5 * A * S / H


def test_all_kept() -> None:
    assert of_a_layer() == pytest.approx(34 + SCORES, rel=0.03)


def test_tensor_parallel() -> None:
    t = 4
    assert of_a_layer(tp=t, sequence_parallel=False) == pytest.approx(10 + 24 / t + SCORES / t, rel=0.05)


def test_sequence_parallel_keeps_what_it_has_gathered() -> None:
    """The paper divides all 34 by t: it gathers the inputs of both column-wise layers again in the backward. Here these two are kept whole."""
    t = 4
    assert of_a_layer(tp=t) == pytest.approx(2 * 2 + 30 / t + SCORES / t, rel=0.05)


def test_fused_attention_keeps_no_scores() -> None:
    assert of_a_layer(FusedLayer) == pytest.approx(34, rel=0.03)


def test_all_run_again() -> None:
    assert of_a_layer(activation_checkpointing="block") == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": "block"}])
def test_blocks_that_did_not_run_are_counted_as_if_they_had(options: dict[str, str]) -> None:
    """Six equal layers, of which two run, against six that differ in a setting that nothing reads."""
    found = []
    for distinct in (False, True):
        with torch.device("meta"):
            model = GPT(6, FusedLayer)
        for i, layer in enumerate(model.layers):
            layer.setting = f"{i}th" if distinct else ""  # type: ignore[assignment]
        plan = Plan({"**": "replicate"}).check(model, 1)
        traced = trace_step(model, loss_of(None), (torch.zeros(B, 64, dtype=torch.int64),), plan, Settings(1, 1, **options))  # type: ignore[arg-type]
        assert len(traced.trace.copies) == (0 if distinct else 4)
        found.append([s for s in live_segments(traced) if s.segment.block])
    skipped, ran = found
    assert [s.segment.block for s in skipped] == [s.segment.block for s in ran]
    for a, b in zip(skipped, ran):
        assert +a.peak == +b.peak and sum(a.end.values()) == sum(b.end.values()), a.segment.block


def test_categories() -> None:
    classes = {"embed": "Embedding", "layers.0.norm": "RMSNorm", "norm": "LayerNorm", "head": "Linear"}
    products = [op("mm", m) for m in ("layers.0.attn.q", "layers.0.mlp.up", "head")]
    made = [
        "embed",
        "norm",
        "head",
        "",
        "mask",
        "layers.0",
        "layers.0.norm",
        "layers.0.attn.q",
        "layers.0.mlp.act",
        "layers.0.drop",
    ]
    sizes = {module: 2**i for i, module in enumerate(made)}
    events = [Alloc(Label(module, "activation"), n) for module, n in sizes.items()]
    tape = Tape("", "forward", events=[*products, op("sdpa", "layers.0.attn"), *events, Alloc(Label("x", "gradient"), 5), End()])
    (found,) = live_segments(model_of([tape], classes=classes, blocks=("layers.0",)))
    assert found.end == {
        "embedding": sizes["embed"],
        "norms": sizes["norm"] + sizes["layers.0.norm"],
        "logits and loss": sizes["head"] + sizes[""],
        "other": sizes["mask"],
        "residual": sizes["layers.0"] + sizes["layers.0.drop"],
        "attention": sizes["layers.0.attn.q"],  # in one child of the block with the attention kernel
        "MLP": sizes["layers.0.mlp.act"],
        "gradient": 5,
    }
