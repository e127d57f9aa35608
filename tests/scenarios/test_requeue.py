"""What goes on by itself: SLURM's requeue (`hpc_ckpt_<n>.ckpt`), and a gradient scaler's scale."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision

import lightning_tp as ltp
from lightning_tp.testing import run_ranks
from tests.checkpoint.runs import Net, data, flip, trainer
from tests.device import ON

MESHES = [(1, 2), (2, 1)]


class StopsAt(Callback):
    """What Lightning's handler of SLURM's signal does: a checkpoint under the name of a requeued job; then the job ends."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir))
            trainer.should_stop = True
            trainer.fit_loop.epoch_loop.max_steps = self.step


def fit(folder: Path, tp: int, *callbacks: Callback, half: bool = False, **options: Any) -> Any:
    if half:  # on a CPU Lightning takes bfloat16 for it, if it is asked by its name
        scaler = torch.amp.GradScaler(ON, init_scale=2.0**24, growth_interval=2)
        options["plugins"] = [MixedPrecision("16-mixed", ON, scaler=scaler)]
    run = trainer(*callbacks, tp=tp, default_root_dir=folder, max_epochs=4, enable_checkpointing=False, **options)
    module = Net()
    run.fit(module, data(), ckpt_path=options.pop("ckpt_path", None))
    scale = run.precision_plugin.scaler.get_scale() if half else None
    return ltp.full_state_dict(module), run.global_step, scale


@pytest.mark.parametrize("mesh", MESHES, ids=["1x2", "2x1"])
@pytest.mark.parametrize("half", [False, True], ids=["32", "16-mixed"])
def test_a_requeued_job_goes_on(mesh: tuple[int, int], half: bool, tmp_path: Path) -> None:
    """The newest whole one, without being asked for; bitwise."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()

    def body() -> Any:
        ref = fit(tmp_path / "whole", mesh[1], half=half)
        fit(tmp_path / "cut", mesh[1], StopsAt(2), half=half)
        fit(tmp_path / "cut", mesh[1], StopsAt(4), half=half)
        return ref, sorted(p for p in os.listdir(tmp_path / "cut") if p.startswith("hpc"))

    def again() -> Any:
        return fit(tmp_path / "cut", mesh[1], half=half)

    (ref, steps, scale), files = run_ranks(body, 2, init=False)[0]
    assert files == ["hpc_ckpt_1.ckpt", "hpc_ckpt_2.ckpt"]
    assert not half or scale != 2.0**24
    for damaged in (False, True):
        if damaged:
            flip(next((tmp_path / "cut" / "hpc_ckpt_2.ckpt").glob("*.distcp")))
        got, got_steps, got_scale = run_ranks(again, 2, init=False)[0]
        assert (got_steps, got_scale) == (steps, scale)
        assert all(torch.equal(t, ref[name]) for name, t in got.items())
