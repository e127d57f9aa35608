"""A rank is killed at a random instant, in a step or in a save; the run goes on from the last checkpoint with the same numbers.

`pytest tests/scenarios/test_faults.py --faults 50` draws 50 instants; by default there are a few. Each is compared with the uninterrupted
run of its mesh: every loss from the last committed save on, bitwise, and the weights in the end.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_tp as ltp
from lightning_tp.checkpoint.manifest import MANIFEST
from lightning_tp.testing import RankError, run_ranks
from tests.trainer.test_strategy import PLAN, QUIET, Net

STEPS, EVERY = 24, 2
MESHES = ((1, 2), (2, 1))
END = 15.0  # seconds that the ranks which are left have to end by themselves


class Run(Net):
    """With dropout, and a record of every step; rank `victim` is killed `after` seconds of training."""

    def __init__(self, folder: Path, victim: int | None, after: float) -> None:
        super().__init__()
        self.folder, self.victim, self.after = folder, victim, after
        self.dropout = nn.Dropout(0.1)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return super().loss(batch) * self.dropout(torch.ones(64)).mean()

    def on_train_start(self) -> None:
        (self.folder / "began").write_text(str(time.time()))
        if self.victim == self.trainer.global_rank:
            subprocess.Popen(["sh", "-c", f"sleep {self.after:.4f}; kill -9 {os.getpid()}"])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.trainer.is_global_zero:
            with (self.folder / "losses").open("a") as f:
                f.write(json.dumps([self.trainer.global_step, outputs["loss"].item(), time.time()]) + "\n")


def train(
    folder: Path, mesh: tuple[int, int], in_background: bool, victim: int | None = None, after: float = 0.0
) -> dict[str, Tensor]:
    L.seed_everything(0, verbose=False)
    strategy = ltp.TPStrategy(tp=mesh[1], plan=PLAN, async_checkpoint=in_background)
    saves = ModelCheckpoint(
        folder / "saves", "{step}", every_n_train_steps=EVERY, save_last=True, save_top_k=2, monitor="step", mode="max"
    )
    options = {**QUIET, "enable_checkpointing": True}
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps=STEPS, callbacks=[saves], **options)
    module = Run(folder, victim, after)
    trainer.fit(module, DataLoader(ltp.RandomTokens(24, 12, 103), batch_size=2, shuffle=True), ckpt_path="last")
    return ltp.full_state_dict(module)


def losses(folder: Path) -> list[tuple[int, float]]:
    return [tuple(json.loads(line)[:2]) for line in (folder / "losses").read_text().splitlines()]


def committed(folder: Path) -> int:
    """The step of the newest checkpoint that stands under its name."""
    return max((json.loads(p.read_text())["step"] for p in folder.glob(f"saves/*/{MANIFEST}")), default=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(weights, losses, seconds) of the uninterrupted run on a mesh."""
    known: dict[tuple[int, int], Any] = {}

    def of(mesh: tuple[int, int]) -> Any:
        if mesh not in known:
            folder = tmp_path_factory.mktemp("whole")
            weights = run_ranks(train, 2, folder, mesh, False, init=False)[0]
            took = time.time() - float((folder / "began").read_text())
            known[mesh] = weights, dict(losses(folder)), took
        return known[mesh]

    return of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each instant is a test, with a time-out of its own."""
    if "trial" in metafunc.fixturenames:
        metafunc.parametrize("trial", range(1, metafunc.config.getoption("--faults") + 1))


@pytest.fixture(scope="module")
def ends() -> list[bool]:
    """For each trial, whether the rank was killed before its end."""
    return []


def test_killed_at_a_random_instant(trial: int, whole: Any, ends: list[bool], tmp_path: Path) -> None:
    draw = random.Random(trial)
    mesh, in_background, victim = draw.choice(MESHES), draw.random() < 0.5, draw.randrange(2)
    weights, ref, took = whole(mesh)
    at = draw.uniform(0, took)
    what = f"mesh {mesh}, rank {victim} killed after {at:.2f} s of {took:.2f}, saves in the background: {in_background}"
    killed, ended_by_it = time.monotonic() + at, False
    try:
        run_ranks(train, 2, tmp_path, mesh, in_background, victim, at, init=False)
    except RankError as error:
        ended_by_it = True
        assert "SIGKILL" in str(error) or "-9" in str(error), f"{what}\n{error}"
        assert time.monotonic() - killed < took + END, what
    before = losses(tmp_path) if (tmp_path / "losses").exists() else []
    newest = committed(tmp_path)
    got = run_ranks(train, 2, tmp_path, mesh, in_background, init=False)[0]
    after = losses(tmp_path)[len(before) :]
    if newest < STEPS:
        assert after[0][0] == newest + 1, f"{what}: step {newest} was committed, and the run went on at step {after[0][0]}"
    assert all(ref[step] == loss for step, loss in before + after), what
    assert all(torch.equal(t, weights[name]) for name, t in got.items()), what
    assert not list(tmp_path.glob("saves/.lightning_tp/*")) or newest == STEPS, what
    lost = (before[-1][0] if before else 0) - newest
    print(f"{what}: went on behind step {newest}, {lost} steps after the last commit")
    assert lost <= 2 * EVERY + 1
    ends.append(ended_by_it)


def test_most_were_killed_before_their_end(ends: list[bool]) -> None:
    """An instant behind the end of a run would test nothing."""
    assert sum(ends) >= len(ends) // 2
