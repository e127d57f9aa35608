"""What `TPStrategy` does by default besides splitting, as a share of a training step.

    OMP_NUM_THREADS=1 python benchmarks/defaults.py

A Llama on two gloo ranks under a Trainer: comparing the batches of a tensor-parallel group, looking for random numbers, keeping numbers plain,
checking gradients of the first steps, watching the other ranks. Each of these is timed where it is called, on rank 0, and the waiting for
the other rank in it is counted too (it would wait in the step's first collective instead). The thread that watches is timed by its own CPU
clock.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import lightning as L
from torch.utils.data import DataLoader

import lightning_tp as ltp
from examples.llama import PLAN, LlamaConfig, LlamaModule
from lightning_tp.core.ops.random_numbers import RandomCallPolicy
from lightning_tp.data import group_loader, same_batch
from lightning_tp.shards import gradients
from lightning_tp.trainer.adapt import metrics
from lightning_tp.trainer.launch import watchdog

SPENT: dict[str, float] = defaultdict(float)  # seconds
THREAD: dict[str, float] = {}


def timed(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            SPENT[what] += time.perf_counter() - began

    return call


class TimedStep:
    """A context, entering and leaving which is timed, and not what runs inside."""

    def __init__(self, what: str, inner: Any) -> None:
        self.what, self.inner = what, inner

    def __enter__(self) -> Any:
        return timed(self.what, self.inner.__enter__)()

    def __exit__(self, *error: Any) -> Any:
        return timed(self.what, self.inner.__exit__)(*error)


def watch_them() -> None:
    """Put a clock around each."""
    same_batch.fingerprint = timed("comparing batches", same_batch.fingerprint)  # type: ignore[attr-defined]
    group_loader.Ranks.over_tp = timed("comparing batches", group_loader.Ranks.over_tp)  # type: ignore[method-assign]
    metrics._full = timed("full tensors", metrics._full)  # type: ignore[attr-defined]
    gradients.PartialGradients._compare_with_plan = timed("checking gradients", gradients.PartialGradients._compare_with_plan)  # type: ignore[method-assign]
    step = RandomCallPolicy.step
    RandomCallPolicy.step = lambda self: TimedStep("looking for random numbers", step(self))  # type: ignore[method-assign]
    look = watchdog.Watchdog._look

    def timed_look(self: Any) -> None:
        THREAD["clock"] = time.pthread_getcpuclockid(threading.get_ident())
        look(self)

    watchdog.Watchdog._look = timed_look  # type: ignore[method-assign]


class Report(L.Callback):
    def __init__(self, skip: int) -> None:
        self.skip = skip

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.skip:
            SPENT.clear()
            self.began = time.perf_counter()
            self.thread = time.clock_gettime(THREAD["clock"])

    def on_train_end(self, trainer: L.Trainer, *args: Any) -> None:
        took, steps = time.perf_counter() - self.began, trainer.global_step - self.skip
        if trainer.is_global_zero:
            SPENT["watching the other ranks"] = time.clock_gettime(THREAD["clock"]) - self.thread
            print(f"{steps} steps of {took / steps * 1e3:.1f} ms")
            for what, seconds in sorted(SPENT.items(), key=lambda item: -item[1]):
                print(f"  {what:28s} {seconds / steps * 1e6:8.1f} us a step  {seconds / took:7.3%}")
            print(f"  {'all':28s} {sum(SPENT.values()) / steps * 1e6:8.1f} us a step  {sum(SPENT.values()) / took:7.3%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--skip", type=int, default=10, help="steps at first that do not count")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--dim", type=int, default=256)
    args = parser.parse_args()
    watch_them()
    L.seed_everything(0, verbose=False)
    config = LlamaConfig(512, args.dim, 8, num_heads=8, num_kv_heads=4, hidden_dim=args.dim * 8 // 3)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ltp.TPStrategy(tp=2, plan=PLAN),
        max_steps=args.steps + args.skip,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Report(args.skip)],
    )
    trainer.fit(LlamaModule(config), DataLoader(ltp.RandomTokens(args.batch * 16, args.seq, 512), batch_size=args.batch))


if __name__ == "__main__":
    main()
