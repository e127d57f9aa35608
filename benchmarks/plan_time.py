"""How long it takes to find a plan, on one thread.

    OMP_NUM_THREADS=1 python benchmarks/plan_time.py

Models of transformers in the sizes that they were published in, 128 tokens, with their weights and on the meta device; Llama 2 70B (80 blocks,
2,048 tokens) on the meta device only.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_tp import infer_plan

Built = tuple[nn.Module, dict[str, Any]]


def llama(width: int, inner: int, blocks: int, heads: int, kv_heads: int, tokens: int) -> Built:
    import transformers as hf

    ids = torch.zeros(1, tokens, dtype=torch.long)
    config = hf.LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=32000,
    )
    return hf.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids, "use_cache": False}


def zoo() -> dict[str, Callable[[], Built]]:
    import transformers as hf

    ids = torch.zeros(1, 128, dtype=torch.long)
    tokens = {"input_ids": ids, "labels": ids}
    return {
        "Llama, 12 blocks of 768": lambda: llama(768, 2048, 12, 12, 12, 128),
        "GPT-2": lambda: (hf.GPT2LMHeadModel(hf.GPT2Config()), tokens),
        "BERT base": lambda: (hf.BertForMaskedLM(hf.BertConfig()), tokens),
        "ViT base": lambda: (hf.ViTForImageClassification(hf.ViTConfig()), {"pixel_values": torch.zeros(1, 3, 224, 224)}),
        "T5, 12 + 12 blocks": lambda: (hf.T5ForConditionalGeneration(hf.T5Config(num_layers=12, decoder_start_token_id=0)), tokens),
    }


def seconds(build: Callable[[], Built], tp: int, *, meta: bool) -> float:
    with torch.device("meta" if meta else "cpu"):
        model, inputs = build()
    inputs = {k: torch.zeros_like(v, device="cpu") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    start = time.perf_counter()
    infer_plan(model, inputs, tp)
    return time.perf_counter() - start


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name, build in zoo().items():
        print(f"{name:28s} {seconds(build, 2, meta=False):6.2f} s, on meta {seconds(build, 2, meta=True):6.2f} s")
    print(f"{'Llama 2 70B, tp=8':28s} {'':8s}  on meta {seconds(lambda: llama(8192, 28672, 80, 64, 8, 2048), 8, meta=True):6.2f} s")


if __name__ == "__main__":
    main()
