"""What a derived plan costs in eager mode besides communication, on models that nobody wrote for it.

    OMP_NUM_THREADS=1 python benchmarks/inferred.py

Hugging Face's Llama, GPT-2 and ViT, and a nanoGPT whose attention has whole sizes in its code: 8 blocks of width 64, forward + backward, one
thread, fake process group of 2 (nothing is moved), in turns with the same model whole. Modules whose own code is given local sizes while
they run are counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from dispatch import interleaved, mesh
from torch import Tensor, nn

import lightning_tp as ltp
from lightning_tp.testing import fake_world

SIZES = {"hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4}


class NanoBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.c_fc, self.mlp_proj = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.heads, self.dim = heads, dim

    def attention(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.dim, dim=2)
        q, k, v = (t.view(B, T, self.heads, C // self.heads).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))


class NanoGPT(nn.Module):
    def __init__(self, vocab: int = 512, dim: int = 64, heads: int = 4, blocks: int = 8) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, dim), nn.Embedding(256, dim)
        self.h = nn.ModuleList(NanoBlock(dim, heads) for _ in range(blocks))
        self.ln_f, self.lm_head = nn.LayerNorm(dim), nn.Linear(dim, vocab, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1]))
        for block in self.h:
            x = block(x)
        return {"loss": F.cross_entropy(self.lm_head(self.ln_f(x)).flatten(0, 1), labels.flatten())}


def zoo(batch: int, seq: int) -> dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]]:
    import transformers as hf

    ids = torch.randint(0, 512, (batch, seq))
    tokens = {"input_ids": ids, "labels": ids}
    images = {"pixel_values": torch.randn(batch, 3, 32, 32), "labels": torch.arange(batch)}
    llama = hf.LlamaConfig(**SIZES, vocab_size=512, intermediate_size=176, num_key_value_heads=2, use_cache=False)
    gpt2 = hf.GPT2Config(vocab_size=512, n_embd=64, n_layer=8, n_head=4, use_cache=False, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    vit = hf.ViTConfig(**SIZES, intermediate_size=176, image_size=32, patch_size=4, num_labels=batch)
    return {
        "Hugging Face Llama": (lambda: hf.LlamaForCausalLM(llama), tokens),
        "Hugging Face GPT-2": (lambda: hf.GPT2LMHeadModel(gpt2), tokens),
        "Hugging Face ViT": (lambda: hf.ViTForImageClassification(vit), images),
        "nanoGPT style": (NanoGPT, tokens),
    }


def step_of(model: nn.Module, inputs: dict[str, Any]) -> Callable[[], None]:
    def step() -> None:
        model(**inputs)["loss"].backward()
        for p in model.parameters():
            p.grad = None

    return step


def named(modules: set[str]) -> str:
    kinds = sorted({".".join("*" if part.isdigit() else part for part in name.split(".")) for name in modules})
    return f" ({', '.join(kinds)})" if kinds else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with fake_world(2):
        for name, (build, inputs) in zoo(args.batch, args.seq).items():
            torch.manual_seed(0)
            split = build()
            plan = ltp.infer_plan(split, inputs, tp=2)
            slow = {e.where for e in plan.check(split, 2).entries if e.style.name == "local_ops"}
            ltp.parallelize(split, mesh(1, 2), plan)
            ms = interleaved({"whole": step_of(build(), inputs), "split": step_of(split, inputs)}, args.rounds)
            print(
                f"{name:20s} whole {ms['whole']:7.2f} ms, split {ms['split']:7.2f} ms, {ms['split'] / ms['whole']:5.2f} x; sequence parallel "
                f"{'on' if plan.sequence_parallel else 'off'}; {len(slow)} modules with local sizes{named(slow)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
