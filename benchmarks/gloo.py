"""Tokens per second of two real ranks on CPU (gloo), against PyTorch's styles under Lightning's own `ModelParallelStrategy`.

    OMP_NUM_THREADS=1 python benchmarks/gloo.py --width 256 --width 1024

Both sides train the same Llama through a Trainer with AdamW and gradient clipping, one thread a rank, taking turns in the same two
processes. The other side is Lightning's tutorial for 2D parallelism: `parallelize_module` with a plan per module written by hand, sequence
parallelism and `loss_parallel()` around loss and backward.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
import lightning_tp as ltp
from examples.llama import PLAN, LlamaConfig, LlamaModule
from lightning_tp.testing import run_ranks

SHAPES = {256: (2, 128, 4), 1024: (2, 256, 2)}  # width: batch, sequence, blocks


class TorchStyles(LlamaModule):
    """The same module as Lightning's tutorial would have it."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["tensor_parallel"]
        plan: dict[str, Any] = {
            "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
        }
        parallelize_module(self.model, mesh, plan)
        for block in self.model.layers:
            plan = {
                "attention_norm": SequenceParallel(),
                "attention": PrepareModuleInput(input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None)),
                "attention.wq": ColwiseParallel(),
                "attention.wk": ColwiseParallel(),
                "attention.wv": ColwiseParallel(),
                "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
                "ffn_norm": SequenceParallel(),
                "feed_forward": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
                "feed_forward.w1": ColwiseParallel(),
                "feed_forward.w3": ColwiseParallel(),
                "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
            }
            parallelize_module(block, mesh, plan)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with loss_parallel():
            return super().loss(batch)

    def backward(self, *args: Any, **kwargs: Any) -> None:
        with loss_parallel():
            super().backward(*args, **kwargs)


class Clock(L.Callback):
    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.times: list[float] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx >= self.warmup:
            self.times.append(time.perf_counter() - self.start)


def fit(ours: bool, width: int, steps: int) -> list[float]:
    batch, seq, blocks = SHAPES[width]
    config = LlamaConfig(vocab_size=2048, dim=width, num_layers=blocks, num_heads=width // 64, num_kv_heads=width // 128,
                         hidden_dim=width * 8 // 3 // 8 * 8, max_seq_len=seq)  # fmt: skip
    torch.manual_seed(0)
    module = LlamaModule(config) if ours else TorchStyles(config)
    clock = Clock(warmup=2)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ltp.TPStrategy(tp=2, plan=PLAN) if ours else ModelParallelStrategy(1, 2),
        max_steps=steps + 2,
        gradient_clip_val=1.0,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, DataLoader(ltp.RandomTokens(10_000, seq, 2048), batch_size=batch))
    return clock.times


def both(width: int, steps: int, rounds: int) -> dict[str, float]:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    times: dict[str, list[float]] = {"ours": [], "torch": []}
    for _ in range(rounds):
        for name in times:
            times[name] += fit(name == "ours", width, steps)
    batch, seq, _ = SHAPES[width]
    return {name: batch * seq / statistics.median(t) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, action="append", choices=sorted(SHAPES))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    for width in args.width or sorted(SHAPES):
        speed = run_ranks(both, 2, width, args.steps, args.rounds, init=False, timeout=3600)[0]
        print(
            f"width {width}: lightning_tp {speed['ours']:8.0f} tokens/s, torch styles {speed['torch']:8.0f} tokens/s, "
            f"ratio {speed['ours'] / speed['torch']:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
