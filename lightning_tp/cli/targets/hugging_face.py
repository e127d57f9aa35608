"""A `config.json` of transformers as TARGET: a model with random weights (on the meta device if it is large), and random tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_tp.cli.targets.target import Target, call_user_code
from lightning_tp.errors import TPError
from lightning_tp.estimate.rank.inputs import default_loss

SMALL = 20_000_000  # parameters up to which a model is built with weights
BATCH, LENGTH = 2, 32  # of the random tokens


def load_config(path: Path, *, weights: bool) -> Target:
    """Load the model of a `config.json`; with `weights`, on the CPU whatever its size."""
    if not path.is_file():
        raise TPError(f"`{path}`: there is no such file.")
    try:
        import transformers
    except ImportError:
        raise TPError(f"`{path}`: a Hugging Face model needs transformers: pip install 'lightning-tp[hf]'.") from None
    transformers.logging.set_verbosity_error()  # what it finds unusual in a config changes nothing here
    config: Any = call_user_code(lambda: transformers.AutoConfig.from_pretrained(str(path)), str(path))
    is_causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    auto: Any = transformers.AutoModelForCausalLM if is_causal else transformers.AutoModel

    def build(**options: Any) -> nn.Module:
        model: nn.Module = call_user_code(lambda: auto.from_config(config, **options), str(path))
        return model

    with torch.device("meta"):
        model = build()
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise TPError(
            f"`{path}`: {type(model).__name__} reads `{model.main_input_name}` instead of tokens. Name a function that returns (model, "
            "inputs)."
        )
    if weights or sum(p.numel() for p in model.parameters()) <= SMALL:
        torch.manual_seed(0)
        model = build(dtype=torch.float32) if weights else build()
    inputs = _random_inputs(config, next(model.parameters()).device, with_labels=is_causal)
    return Target(lambda: build(dtype=torch.float32), model, inputs, default_loss)


def _random_inputs(config: Any, device: torch.device, *, with_labels: bool) -> dict[str, Any]:
    text_config = config.get_text_config()
    length = min(LENGTH, getattr(text_config, "max_position_embeddings", None) or LENGTH)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, text_config.vocab_size, (BATCH, length), generator=generator).to(device)
    inputs: dict[str, Any] = {"input_ids": ids}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    else:
        inputs["use_cache"] = False
    if with_labels:
        inputs["labels"] = ids
    return inputs
