"""What `test_elastic.py` starts on every node by torchrun: the same numbers on one node and on two."""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, DistributedSampler

import lightning_tp as ltp
from examples.llama import PLAN, LlamaConfig, LlamaModule

STEPS, GLOBAL_BATCH, BATCH = 20, 8, 4


class Record(L.Callback):
    """Of each step, before it is saved: whoever is killed between the two takes it again, and none is missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        with (self.folder / f"log.{trainer.global_rank}").open("a") as f:
            f.write(json.dumps([trainer.global_step, trainer.world_size, os.getpid()]) + "\n")


class Net(LlamaModule):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        time.sleep(float(os.environ.get("PAUSE", "0")))


def train(folder: Path, *, tp: int = 2, nodes: int = 1) -> None:
    L.seed_everything(0, verbose=False)
    module = Net(LlamaConfig(103, 32, 2, num_heads=4, num_kv_heads=2, hidden_dim=48))
    strategy = ltp.TPStrategy(tp=tp, plan=PLAN, global_batch=GLOBAL_BATCH, timeout=timedelta(seconds=20))
    saves = ModelCheckpoint(folder / "saves", "{step}", every_n_train_steps=2, save_last=True, save_top_k=-1)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=tp,
        num_nodes=nodes,
        strategy=strategy,
        max_steps=STEPS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Record(folder), saves],
    )
    dataset = ltp.RandomTokens(64, 12, 103)
    sampler = DistributedSampler(dataset, nodes, int(os.environ["RANK"]) // tp, shuffle=True)  # one order, dealt out in turn
    trainer.fit(module, DataLoader(dataset, batch_size=BATCH, sampler=sampler), ckpt_path="last")
    weights = ltp.full_state_dict(module)
    if trainer.is_global_zero:
        torch.save(weights, folder / "weights.pt")


if __name__ == "__main__":
    train(Path(sys.argv[1]), nodes=int(os.environ["WORLD_SIZE"]) // 2)
