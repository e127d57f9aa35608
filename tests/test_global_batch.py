"""`TPStrategy(global_batch=..)`: the steps of one process with the whole batch, on any mesh."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader

import lightning_tp as ltp
from lightning_tp.global_batch import batches_to_accumulate
from lightning_tp.testing import assert_trees_close
from tests.test_strategy import QUIET, Net, on, strategy


class Scheduled(Net):
    """With a learning rate that depends on how many steps there will be."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-3)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def run(strategy: Any, batch: int, **options: Any) -> tuple[int, int, dict[str, torch.Tensor]]:
    world = 1 if strategy == "auto" else strategy._asked[0] * strategy._asked[1]
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
        made._asked = (tp, dp)
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
    with pytest.raises(ltp.TPError, match="no batches for 3"):
        batches_to_accumulate(2, 1, 3)
