"""`TPStrategy(global_batch=..)`: the steps of one process with the whole batch, on any mesh."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch.utils.data import DataLoader, DistributedSampler

import lightning_tp as ltp
from lightning_tp.testing import assert_trees_close, run_ranks
from lightning_tp.trainer.adapt.global_batch import batches_to_accumulate, rescale
from tests.trainer.test_strategy import QUIET, Net, on, strategy


class Scheduled(Net):
    """With a learning rate that depends on how many steps there will be."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-3)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def run(strategy: Any, batch: int, **options: Any) -> tuple[int, int, dict[str, torch.Tensor]]:
    world = 1 if strategy == "auto" else strategy.requested_sizes[0] * strategy.requested_sizes[1]
    trainer = L.Trainer(accelerator="cpu", devices=world, strategy=strategy, **{**QUIET, "max_epochs": 2, **options})
    module = Scheduled()
    trainer.fit(module, DataLoader(ltp.RandomTokens(32, 12, 103), batch_size=batch))
    return trainer.global_step, trainer.accumulate_grad_batches, ltp.full_state_dict(module)


@pytest.mark.parametrize("mesh", [(1, 2), (2, 1), pytest.param((2, 2), marks=pytest.mark.slow)])
def test_steps_of_one_process(mesh: tuple[int, int]) -> None:
    dp, tp = mesh
    steps, _, ref = on(1, lambda: run("auto", 8))[0]

    def body() -> Any:
        # what was set is taken back after the run, and said anew in the next
        made = strategy(mesh, dp=dp, global_batch=8)
        made.requested_sizes = (tp, dp)
        return [run(made, 2, use_distributed_sampler=True)]

    for results in on(dp * tp, body):
        for got_steps, left, weights in results:
            assert (got_steps, left) == (steps, 1)
            if dp == 1:  # over dp Lightning's sampler shuffles: other items in a step
                assert_trees_close(weights, ref, rtol=1e-4)


def test_a_mesh_of_another_size_takes_the_same_steps() -> None:
    """Sets of items are those of the larger mesh: what two ranks have at once, one has one after the other."""
    ref = on(2, lambda: run(strategy((2, 1), dp=2, global_batch=8), 2))[0]
    got = on(1, lambda: run(strategy((1, 1), dp=1, global_batch=8), 2, use_distributed_sampler=False))[0]
    assert got[0] == ref[0]


@pytest.mark.parametrize(
    "options, batch, message",
    [
        (dict(global_batch=7), 2, "use a batch size of 1, 7"),
        (dict(global_batch=0), 2, "1 or more"),
    ],
)
def test_what_does_not_make_it_up(options: dict[str, Any], batch: int, message: str) -> None:
    def body() -> None:
        with pytest.raises(ltp.TPError, match=message):
            run(strategy((1, 1), dp=1, **options), batch)

    on(1, body)


def test_it_is_the_only_one_to_accumulate() -> None:
    def body() -> None:
        for options in (dict(accumulate_grad_batches=2), dict(callbacks=[GradientAccumulationScheduler({1: 2})])):
            with pytest.raises(ltp.TPError, match="leave `accumulate_grad_batches`"):
                run(strategy((1, 1), dp=1, global_batch=8), 2, **options)

    on(1, body)


def test_batches_to_accumulate() -> None:
    assert batches_to_accumulate(512, 4, 64) == 2
    with pytest.raises(ltp.TPError, match="no batch size fits 3"):
        batches_to_accumulate(2, 1, 3)


# ------------------------------------------------------------------------------------------- a mesh that grows or shrinks


class Dealt(Net):
    """Keeps where it is in its epoch, as the loops count it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int, bool]] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer = self.trainer
        self.seen.append((trainer.global_step, batch_idx, trainer.is_last_batch))


def dealt(folder: Path | None, stop: int, dp: int) -> tuple[list[tuple[int, int, bool]], dict[str, torch.Tensor]]:
    """Batches of 2 on each of `dp` ranks, 4 steps of 8 items an epoch, up to this step; saved by `ModelCheckpoint`, after each."""
    dataset = ltp.RandomTokens(32, 12, 103)
    sampler = DistributedSampler(dataset, dp, int(os.environ.get("RANK", 0)), shuffle=True)
    saves = [ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_last=True, save_top_k=-1)] if folder is not None else []
    options = {**QUIET, "enable_checkpointing": folder is not None, "max_epochs": 2, "max_steps": stop, "callbacks": saves}
    trainer = L.Trainer(accelerator="cpu", devices=dp, strategy=ltp.TPStrategy(tp=1, global_batch=8), **options)
    L.seed_everything(0, verbose=False)
    module = Dealt()
    trainer.fit(module, DataLoader(dataset, batch_size=2, sampler=sampler), ckpt_path="last" if folder is not None else None)
    return module.seen, ltp.full_state_dict(module)


SLOW = [(1, 2, 5), (2, 1, 3), (2, 1, 5)]  # 5: in the second epoch


@pytest.mark.parametrize("before, now, at", [(1, 2, 3), *(pytest.param(*c, marks=pytest.mark.slow) for c in SLOW)])
def test_another_mesh_goes_on_in_the_middle_of_an_epoch(before: int, now: int, at: int, tmp_path: Path) -> None:
    """From what `ModelCheckpoint` saved at the end of a batch: the other mesh's steps, items and places in the epoch."""
    ref, weights = run_ranks(dealt, now, None, 8, now, init=False)[0]
    run_ranks(dealt, before, tmp_path, at, before, init=False)
    got, ends = run_ranks(dealt, now, tmp_path, 8, now, init=False)[0]
    assert got == ref[at * 4 // now :] and got[-1][2]
    assert_trees_close(ends, weights, rtol=1e-4)


@pytest.mark.parametrize("kind", ["ready", "read"])
def test_what_is_no_whole_number_of_batches(kind: str) -> None:
    counts = {"ready": 7 if kind == "ready" else 8, "completed": 7}
    loaded = {"loops": {"fit_loop": {"epoch_loop.batch_progress": {"total": dict(counts), "current": counts}}}}
    with pytest.raises(
        ltp.TPError, match="after 7 batches on each of 1 data-parallel ranks, which is not a whole number of batches on 2"
    ):
        rescale(loaded, [{"read": 7}], before=1, now=2)


def test_progress_of_another_mesh() -> None:
    """The epoch before had 3 batches; what was begun and not completed is one batch on any mesh."""
    progress = {"total": {"ready": 11, "completed": 10}, "current": {"ready": 8, "completed": 7}}
    positions = [{"read": 8}]
    rescale({"loops": {"fit_loop": {"epoch_loop.batch_progress": progress}}}, positions, before=1, now=2)
    assert progress == {"total": {"ready": 5, "completed": 4}, "current": {"ready": 4, "completed": 3}}
    assert positions == [{"read": 4}]
