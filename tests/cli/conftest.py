"""TARGETs for the tests of the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TARGETS = """
import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from examples.llama import PLAN, Llama, LlamaConfig

TOKENS = torch.randint(0, 130, (4, 13), generator=torch.Generator().manual_seed(0))

def llama():
    model = Llama(LlamaConfig(vocab_size=130, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=54))
    model.plan = PLAN
    return model, TOKENS

def with_loss():
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)), (torch.ones(2, 4, 8),), lambda y: y.square().mean()

class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

def fused():
    return Fused(), {"x": torch.ones(2, 3, 16)}

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = llama()[0]
        self.example_input_array = TOKENS

    def forward(self, tokens):
        return self.net(tokens)

class Bare(L.LightningModule):
    pass

def vit():
    from transformers import ViTConfig, ViTForImageClassification
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=10))
    labels, weight = torch.tensor([3, 7]), torch.ones(10)
    return model, {"pixel_values": torch.randn(2, 3, 32, 32)}, lambda out: F.cross_entropy(out.logits, labels, weight)

def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=130)
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4))
    return model, {"input_ids": TOKENS, "labels": TOKENS, "use_cache": False}

def wrong():
    return 3

def leaves():
    raise SystemExit("I leave")

def no_loss():
    return (*with_loss()[:2], 3.0)

def loss_fails():
    return (*with_loss()[:2], lambda y: y.no_such_thing)

class Fails(nn.Linear):
    def forward(self, x):
        raise ValueError("my mistake")

def fails_forward():
    return Fails(4, 4), torch.ones(2, 4)

def fails():
    raise KeyError("no such thing")
"""
LLAMA_7B: dict[str, Any] = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32000,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
    dtype="bfloat16",
)


@pytest.fixture
def targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """`targets("llama")`: a TARGET in a file of its own."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    file = tmp_path / "targets_of_test_cli.py"
    file.write_text(TARGETS)
    yield lambda name: f"{file}:{name}"
    sys.modules.pop("targets_of_test_cli", None)


@pytest.fixture
def llama_config(tmp_path: Path) -> Callable[..., str]:
    """`llama_config(num_hidden_layers=2)`: the config.json of a Llama 7B, with changes."""

    def write(**changes: Any) -> str:
        (tmp_path / "config.json").write_text(json.dumps({**LLAMA_7B, **changes}))
        return str(tmp_path / "config.json")

    return write


@pytest.fixture
def config(llama_config: Callable[..., str]) -> str:
    """The config.json of a small Llama with four layers."""
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4}
    return llama_config(**sizes, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True, dtype="float32")
