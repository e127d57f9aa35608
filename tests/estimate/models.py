"""Small models of four architectures, with their inputs and losses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

B, T, V = 2, 64, 256
Model = tuple[Callable[[], nn.Module], dict[str, Any], Callable[..., torch.Tensor] | None]


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))


def llama() -> Model:
    from llama import Llama, LlamaConfig

    return lambda: Llama(LlamaConfig(vocab_size=V, num_layers=5)), {"tokens": tokens()}, None


def meta_llama(layers: int = 6, **options: Any) -> nn.Module:
    """A Llama on the meta device, of 512 tokens where nothing else is said."""
    from llama import Llama, LlamaConfig

    with torch.device("meta"):
        return Llama(LlamaConfig(num_layers=layers, **options))


TOKENS = {"tokens": torch.zeros(2, 64, dtype=torch.int64)}


def gpt2() -> Model:
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(vocab_size=V, n_positions=T, n_embd=128, n_layer=4, n_head=8, attn_implementation="sdpa")
    ids = tokens()
    return lambda: AutoModelForCausalLM.from_config(config), {"input_ids": ids, "labels": ids, "use_cache": False}, None


def bert() -> Model:
    from transformers import AutoModelForMaskedLM, BertConfig

    config = BertConfig(
        vocab_size=V, hidden_size=128, num_hidden_layers=4, num_attention_heads=8, intermediate_size=384, max_position_embeddings=T
    )
    ids = tokens()
    return lambda: AutoModelForMaskedLM.from_config(config), {"input_ids": ids, "labels": ids}, None


def vit() -> Model:
    from transformers import AutoModelForImageClassification, ViTConfig

    config = ViTConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=512,
        image_size=64,
        patch_size=8,
        num_labels=10,
    )
    pixels = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return (
        lambda: AutoModelForImageClassification.from_config(config),
        {"pixel_values": pixels, "labels": torch.tensor([1, 2, 3, 4])},
        None,
    )


MODELS: dict[str, Callable[[], Model]] = {"llama": llama, "gpt2": gpt2, "bert": bert, "vit": vit}
