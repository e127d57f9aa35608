"""Estimates and pictures of small models that several files look at."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from lightning_tp.estimate import Estimate, estimate
from lightning_tp.estimate.cost.collectives import NORM, PARTIAL
from lightning_tp.estimate.drawn.picture import Picture
from lightning_tp.estimate.drawn.picture_from_trace import picture_from_trace
from lightning_tp.plan.checked import CheckedPlan
from tests.estimate.models import MODELS

IDS = torch.zeros(2, 32, dtype=torch.int64)


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4,
        num_local_experts=4,
    )  # fmt: skip
    return lambda: MixtralForCausalLM(config), {"input_ids": IDS, "labels": IDS, "use_cache": False}, None


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=256, d_model=64, d_kv=8, num_heads=8, d_ff=128, num_layers=3, decoder_start_token_id=0, pad_token_id=0
    )
    return lambda: T5ForConditionalGeneration(config), {"input_ids": IDS, "labels": IDS, "use_cache": False}, None


def written_out() -> Any:
    def build() -> nn.Module:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 8, 128, batch_first=True), 3, enable_nested_tensor=False)

    return build, (torch.ones(2, 16, 64),), lambda y: y.mean()


ZOO = {**{k: v for k, v in MODELS.items() if k != "bert"}, "mixtral": mixtral, "t5": t5, "nn.TransformerEncoder": written_out}


@cache
def picture_in_zoo(name: str) -> tuple[nn.Module, CheckedPlan, Picture, dict[str, int]]:
    build, inputs, loss = ZOO[name]()
    model = build()
    found = estimate(model, inputs, (1, 2), loss_fn=loss, precision="bf16-true")
    assert found.traced is not None
    plan, rank, whole = found.traced
    sent: dict[str, int] = {}
    for c in found.collectives:
        if c.axis == "tp" and c.where not in (NORM, PARTIAL):
            sent[c.kind] = sent.get(c.kind, 0) + c.count
    return model, plan, picture_from_trace(type(model).__name__, plan, rank, whole), sent


@pytest.fixture(params=ZOO)
def drawn(request: pytest.FixtureRequest) -> tuple[nn.Module, CheckedPlan, Picture, dict[str, int]]:
    """(model, plan, picture, collectives of the forward and backward by kind)."""
    return picture_in_zoo(request.param)


@pytest.fixture(scope="session")
def found() -> Estimate:
    """A Llama over tp=2 and dp=4, with recomputed blocks and two micro-batches."""
    build, inputs, loss = MODELS["llama"]()
    return estimate(build(), inputs, (4, 2), loss_fn=loss, activation_checkpointing="selective", accumulate=2)
