"""How much memory writing and reading a whole model takes, beside what is held anyway: on each of two gloo ranks, for a model of 2 GB.

    python benchmarks/checkpoint_memory.py [--gb 2] [--out FOLDER]

For each way of saving, loading or exporting it prints what it added to the peak of anonymous memory (sampled every 5 ms from /proc/self/status)
and the same as a multiple of the model's largest tensor. Pages of files that are mapped are not counted: the kernel takes them back when it likes.
The files are made in a temporary folder, 10 bytes for each byte of the model, and removed.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_tp as ltp
from lightning_tp.testing import run_ranks


class Net(L.LightningModule):
    """A stack of MLPs: weights of 64 MiB, most of them, and an embedding of 256 MiB."""

    def __init__(self, blocks: int, width: int = 2048, vocab: int = 32768) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False))
            for _ in range(blocks)
        )

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        x = self.embed(batch["tokens"])
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


PLAN = {"embed": "vocab_embedding", "blocks.*.0": "colwise", "blocks.*.2": "rowwise"}


def anonymous() -> int:
    """Bytes of this process that no file stands behind."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


class Peak:
    """How far anonymous memory rises above where it was."""

    def __enter__(self) -> Peak:
        gc.collect()
        self.base = self.peak = anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        self._began = time.perf_counter()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, anonymous())

    def __exit__(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self._began
        self._stop.set()
        self._thread.join()
        self.extra = max(self.peak, anonymous()) - self.base


def trainer(**options: Any) -> L.Trainer:
    quiet: dict[str, Any] = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    return L.Trainer(accelerator="cpu", devices=2, strategy=ltp.TPStrategy(tp=2, plan=PLAN, **options), max_steps=1, **quiet)


def loader() -> DataLoader[Any]:
    return DataLoader(ltp.RandomTokens(num_items=2, seq_len=8, vocab_size=512), batch_size=2)


def on_ranks(blocks: int, folder: str) -> dict[str, tuple[int, float]]:
    found: dict[str, tuple[int, float]] = {}

    def measure(name: str, do: Callable[[], Any]) -> None:
        torch.distributed.barrier()
        with Peak() as peak:
            do()
        torch.distributed.barrier()
        found[name] = peak.extra, peak.seconds

    for name, distributed in (("one file", False), ("folder", True)):
        t = trainer(save_distributed_checkpoint=distributed)
        with t.init_module(empty_init=True):
            net = Net(blocks)
        t.fit(net, loader())
        t.strategy.optimizers[0].zero_grad()
        path = os.path.join(folder, name.replace(" ", "-"))
        measure(f"save, {name}", partial(t.save_checkpoint, path))
        measure(f"load, {name}", partial(t.strategy.load_checkpoint, path, weights_only=True))
        del t, net
        gc.collect()
    return found


def alone(what: str, folder: str, blocks: int) -> tuple[int, float]:
    root = Path(folder)
    todo: dict[str, Callable[[], Any]] = {
        "export safetensors": lambda: ltp.export(root / "folder", root / "st"),
        "export safetensors bf16": lambda: ltp.export(root / "folder", root / "st16", dtype="bf16"),
        "export torch": lambda: ltp.export(root / "folder", root / "one.pt", "torch"),
        "consolidate": lambda: ltp.consolidate(root / "folder", root / "one.ckpt"),
        "load_from_checkpoint(folder)": lambda: Net.load_from_checkpoint(root / "folder", weights_only=True),
    }
    with Peak() as peak:
        made = todo[what]()
    return peak.extra - held(made), peak.seconds


def held(model: Any) -> int:
    """Bytes that this rank keeps of it."""
    return sum(p.nbytes for p in model.parameters()) if isinstance(model, nn.Module) else 0


def pretrained(blocks: int, folder: str) -> tuple[int, float]:
    from lightning_tp.core.comm.mesh import make_mesh

    with Peak() as peak:
        with ltp.init_on_meta():
            net = Net(blocks)
        ltp.load_pretrained(net, Path(folder) / "st")
        ltp.parallelize(net, make_mesh("cpu", 1, 2), PLAN)
    return peak.extra - held(net), peak.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0, help="size of the model (default: %(default)s)")
    parser.add_argument("--out", default=None, help="where the temporary folder is made")
    args = parser.parse_args()
    largest = 32768 * 2048 * 4
    blocks = max(1, round((args.gb * 1e9 - largest) / (2 * 4 * 2048 * 2048 * 4)))
    total = largest + blocks * 2 * 4 * 2048 * 2048 * 4
    print(
        f"model: {total / 1e9:.2f} GB, largest tensor {largest / 2**20:.0f} MiB; peak of anonymous memory beside what is held and loaded"
    )
    folder = tempfile.mkdtemp(prefix="checkpoint_memory-", dir=args.out)

    def show(name: str, *of: tuple[int, float]) -> None:
        ranks = ", ".join(f"{extra / 2**20:7.0f} MiB = {extra / largest:5.2f} largest" for extra, _ in of)
        print(f"{name:34} {ranks}   {max(s for _, s in of):5.1f} s", flush=True)

    try:
        results = run_ranks(on_ranks, 2, blocks, folder, init=False, timeout=900)
        for name in results[0]:
            show(name, *(of[name] for of in results))
        for what in (
            "export safetensors",
            "export safetensors bf16",
            "export torch",
            "consolidate",
            "load_from_checkpoint(folder)",
        ):
            show(what, *run_ranks(alone, 1, what, folder, blocks, init=False, timeout=900))
            for name in ("st16", "one.pt", "one.ckpt"):
                path = Path(folder) / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        show("load_pretrained", *run_ranks(pretrained, 2, blocks, folder, timeout=900))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
