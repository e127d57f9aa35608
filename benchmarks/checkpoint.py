"""How long a training step stands still for a checkpoint: written in the step, against `TPStrategy(async_checkpoint=True)`.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py --width 1024

Two real ranks on CPU (gloo), one thread each, a Llama with the state of AdamW. The two ways take turns in one run, each after the save before has
ended. Also shown: what a step takes while a checkpoint is written beside it (on a CPU, that takes turns with training for the cores), and how long
that goes on.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
import lightning_tp as ltp
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp.testing import run_ranks


class Net(L.LightningModule):
    """Trains, and saves now and then in both ways."""

    def __init__(self, width: int, folder: Path, rounds: int) -> None:
        super().__init__()
        self.model = Llama(LlamaConfig(vocab_size=2048, dim=width, num_layers=4, hidden_dim=4 * width, num_heads=8, num_kv_heads=8))
        self.folder, self.rounds = folder, rounds
        self.stalls: dict[str, list[float]] = {"in the step": [], "beside it": []}
        self.steps: dict[str, list[float]] = {"alone": [], "beside a save": []}
        self.writes: list[float] = []
        self.began = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())

    def on_train_batch_start(self, *args: Any) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        strategy: Any = self.trainer.strategy
        beside = strategy.checkpoint_writer.busy
        self.steps["beside a save" if beside else "alone"].append(time.perf_counter() - self.began)
        if beside:
            begin = time.perf_counter()
            strategy.checkpoint_writer.finish()
            self.writes.append(self.steps["beside a save"][-1] + time.perf_counter() - begin)
        for way in self.stalls:
            strategy.async_checkpoint = way == "beside it"
            strategy.checkpoint_writer.finish()
            torch.distributed.barrier()
            begin = time.perf_counter()
            self.trainer.save_checkpoint(self.folder / f"{way.replace(' ', '_')}.ckpt")
            self.stalls[way].append(time.perf_counter() - begin)
        if len(self.stalls["beside it"]) >= self.rounds:
            self.trainer.should_stop = True
        elif len(self.stalls["beside it"]) % 2:
            strategy.checkpoint_writer.finish()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def body(width: int, rounds: int, folder: Path) -> Net:
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=ltp.TPStrategy(tp=2, plan=PLAN), max_epochs=1, **quiet)
    module = Net(width, folder, rounds)
    trainer.fit(module, DataLoader(ltp.RandomTokens(4 * rounds, 64, 2048), batch_size=2))
    size = sum(f.stat().st_size for f in (folder / "in_the_step.ckpt").rglob("*"))
    return {"stalls": module.stalls, "steps": module.steps, "writes": module.writes, "bytes": size}  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    for width in args.width or [512]:
        with tempfile.TemporaryDirectory() as folder:
            found: Any = run_ranks(body, 2, width, args.rounds, Path(folder), init=False, timeout=1200)[0]
        in_step, beside = (statistics.median(times[1:]) for times in found["stalls"].values())  # the first makes memory and groups
        print(f"width {width}: a checkpoint of {found['bytes'] / 1e6:,.0f} MB, tp=2")
        print(
            f"  stall of the step   in the step {in_step * 1e3:8.1f} ms   beside it {beside * 1e3:8.1f} ms   {in_step / beside:5.1f} x shorter"
        )
        alone, during = (statistics.median(times) * 1e3 for times in found["steps"].values())
        print(f"  a step              alone {alone:8.1f} ms   while one is written {during:8.1f} ms")
        print(f"  from the next step until it is written: {statistics.median(found['writes']) * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
