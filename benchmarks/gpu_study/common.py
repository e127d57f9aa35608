"""What the sections share: where they run, small models, a LightningModule that keeps its losses, and fits of one rank or two on one device."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gpu_study.staged import register
from lightning_tp import TPStrategy
from lightning_tp.testing import run_ranks

DEVICE = os.environ.get("GPU_STUDY_DEVICE", "cuda")
SMALL = os.environ.get("GPU_STUDY_SMALL") == "1"
ON_GPU = DEVICE == "cuda"
WORDS = 128
QUIET: dict[str, Any] = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
Make = Callable[[], nn.Module]
Options = dict[str, Any]

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
transformers.logging.set_verbosity_error()


def llama(**changed: Any) -> nn.Module:
    """A Llama of two blocks; the same weights every time."""
    torch.manual_seed(0)
    sizes: Options = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    fixed: Options = dict(vocab_size=WORDS, max_position_embeddings=64, use_cache=False)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **fixed, **changed}))


def gpt2(dropout: float = 0.0, **changed: Any) -> nn.Module:
    """A GPT-2 of two blocks, with dropout where activations are whole."""
    torch.manual_seed(0)
    sizes: Options = dict(
        n_embd=64, n_layer=2, n_head=4, vocab_size=WORDS, n_positions=64, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    rates: Options = dict(resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=0.0)
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **rates, **changed}))


def language_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class Net(L.LightningModule):
    """Trains a language model and keeps the losses."""

    def __init__(self, make: Make, *, sgd: bool = False, lr: float = 1e-2, fused: bool = False) -> None:
        super().__init__()
        self.model, self.sgd, self.lr, self.fused = make(), sgd, lr, fused
        self.losses: list[Tensor] = []

    def training_step(self, batch: Tensor, i: int) -> Tensor:
        loss = language_loss(self.model(input_ids=batch).logits, batch)
        self.log("loss", loss)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.sgd:
            return torch.optim.SGD(self.parameters(), lr=self.lr)
        return torch.optim.AdamW(self.parameters(), lr=self.lr, eps=1e-4, fused=self.fused or None)


def loader(pin_memory: bool = False) -> DataLoader:
    """Eight batches of two sequences."""
    tokens = torch.randint(0, WORDS, (16, 24), generator=torch.Generator().manual_seed(1))
    return DataLoader(tokens, batch_size=2, pin_memory=pin_memory)  # type: ignore[arg-type]


def trainer(tp: int, strategy: Options | None = None, **options: Any) -> L.Trainer:
    """One rank, or ranks that share the one device: to Lightning, each is alone on its node."""
    if tp == 1:
        return L.Trainer(accelerator=DEVICE, devices=1, **{**QUIET, **options})
    how = TPStrategy(tp=tp, process_group_backend=shared_group(), **(strategy or {}))
    return L.Trainer(accelerator=DEVICE, devices=1, num_nodes=tp, strategy=how, **{**QUIET, **options})


def shared_group() -> str:
    """Prepare a rank that shares the device with others; the backend of its process group."""
    register()
    os.environ.update(NODE_RANK=os.environ["RANK"], GROUP_RANK=os.environ["RANK"], LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    return "staged" if ON_GPU else "gloo"


def fit(tp: int, make: Make, options: Options | None, strategy: Options | None, net: Options | None, times: int = 1) -> list[float]:
    """On a rank: the losses of some steps."""
    L.seed_everything(7, verbose=False)
    module = Net(make, **(net or {}))
    for _ in range(times):
        trainer(tp, strategy, **{"max_steps": 4, **(options or {})}).fit(module, loader(ON_GPU))
    return [float(x) for x in module.losses]


def fits(tp: int, make: Make, options: Any = None, strategy: Any = None, net: Any = None, times: int = 1) -> list[list[float]]:
    """The same on all ranks: a list for each."""
    return run_ranks(fit, tp, tp, make, options, strategy, net, times, init=False, timeout=100)


def short(error: BaseException, length: int = 200) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:length]}"


def wait_for_device() -> None:
    if ON_GPU:
        torch.cuda.synchronize()
