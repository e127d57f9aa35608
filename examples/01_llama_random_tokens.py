"""Train a Llama sharded across two processes, on random tokens that it memorises. Needs no GPU and no download.

    python examples/01_llama_random_tokens.py

It prints the plan, what each rank holds, a progress bar, and at the end:

    Throughput: 5,445 tokens/s, 94.0 ms/step over 197 steps, 28.0 GFLOP/s
    Loss 0.008 after 200 steps (uniform prediction: 6.238)

Lightning starts the second process itself. GPUs are used if there is one for each rank. Other meshes: `--tp 4`, or
`--tp 2 --dp 2` (two tensor-parallel groups of two ranks, with half of the data each, and FSDP2 across the groups).
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on the CPU, one thread per rank; torch reads it on import

import argparse
import math

import lightning as L
import torch
from llama import PLAN, LlamaConfig, LlamaModule
from torch.utils.data import ConcatDataset, DataLoader

import lightning_tp as ltp
from lightning_tp.callbacks import ShardSummary


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a Llama on random tokens.")
    parser.add_argument("--tp", type=int, default=2, help="tensor-parallel size (default: 2)")
    parser.add_argument("--dp", type=int, help="data-parallel size (default: devices / tp)")
    parser.add_argument("--devices", type=int, help="number of ranks: GPUs, else CPU processes (default: tp * dp)")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--fast", action="store_true", help="run 8 steps only, as a smoke test")
    args = parser.parse_args()
    devices = args.devices or args.tp * (args.dp or 1)
    steps = 8 if args.fast else args.max_steps

    L.seed_everything(1)
    trainer = L.Trainer(
        accelerator="cuda" if torch.cuda.device_count() >= devices else "cpu",
        devices=devices,
        strategy=ltp.TPStrategy(tp=args.tp, dp=args.dp or "auto", plan=PLAN),
        max_epochs=1,
        max_steps=steps,
        callbacks=[ltp.Throughput(), ShardSummary()],  # tokens per second; what each rank holds
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    config = LlamaConfig(vocab_size=512, dim=128, num_layers=4, num_heads=8, num_kv_heads=4, hidden_dim=344)
    items = ltp.RandomTokens(num_items=32, seq_len=64, vocab_size=config.vocab_size)
    repeats = math.ceil(steps * 8 * (devices // args.tp) / len(items))
    data = DataLoader(ConcatDataset([items] * repeats), batch_size=8)  # the same 32 items over and over
    trainer.fit(LlamaModule(config, lr=3e-3), data)
    loss = trainer.callback_metrics["loss"]
    trainer.print(f"Loss {loss:.3f} after {trainer.global_step} steps (uniform prediction: {math.log(config.vocab_size):.3f})")


if __name__ == "__main__":
    main()
