"""Train a Llama sharded across two processes on the source of Python's standard library, byte by byte.

    python examples/02_llama_text.py

    On 1,211,865 validation bytes     nats/byte  bits/byte
    bigram model                          2.477      3.573
    Llama after 614,400 bytes             1.932      2.787

A convergence check: the Llama has to beat a bigram model of bytes (`bigram_loss`). It stops when its loss on part of the
validation bytes is below 0.8 of the bigram model's; then both are evaluated on all of them. Exit status 1 if it fails.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on the CPU, one thread per rank; torch reads it on import

import argparse
import math
import sys

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from llama import PLAN, LlamaConfig, LlamaModule
from text import StdlibText, bigram_loss
from torch.utils.data import DataLoader, Subset

import lightning_tp as ltp


class TextModule(LlamaModule):
    """The Llama with a warmup and a decay of the learning rate."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, betas=(0.9, 0.95))
        steps = self.trainer.max_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 50, 1 - step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a Llama on text, against a bigram model.")
    parser.add_argument("--max-steps", type=int, default=500)
    parser.add_argument("--fast", action="store_true", help="run 20 steps on 200 kB only, as a smoke test; it need not win")
    args = parser.parse_args()
    steps = 20 if args.fast else args.max_steps

    L.seed_everything(1)
    train, val = (StdlibText(128, split, max_bytes=200_000 if args.fast else None) for split in ("train", "val"))
    bigram = bigram_loss(train.bytes, val.bytes)
    some = Subset(val, range(0, len(val), math.ceil(len(val) / 256)))  # 256 windows, spread over the validation bytes

    trainer = L.Trainer(
        accelerator="cuda" if torch.cuda.device_count() >= 2 else "cpu",
        devices=2,
        strategy=ltp.TPStrategy(tp=2, plan=PLAN),
        max_epochs=1,
        max_steps=steps,
        limit_train_batches=steps,
        val_check_interval=min(steps, 50),
        callbacks=[ltp.Throughput(), EarlyStopping("val_loss", patience=steps, stopping_threshold=0.8 * bigram)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    module = TextModule(LlamaConfig(vocab_size=256, dim=128, num_heads=4, num_kv_heads=2), lr=3e-3)
    trainer.fit(module, DataLoader(train, batch_size=16, shuffle=True), DataLoader(some, batch_size=32))
    seen = trainer.global_step * 16 * 128
    loss = trainer.validate(module, DataLoader(val, batch_size=32), verbose=False)[0]["val_loss"]

    trainer.print(f"\n{f'On {len(val.bytes):,} validation bytes':32}  nats/byte  bits/byte")
    for name, nats in (("bigram model", bigram), (f"Llama after {seen:,} bytes", loss)):
        trainer.print(f"{name:32}  {nats:9.3f}  {nats / math.log(2):9.3f}")
    return 0 if args.fast or loss < bigram else 1


if __name__ == "__main__":
    sys.exit(main())
