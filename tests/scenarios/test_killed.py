"""Killed during an export, a consolidation, a save in the background, or a change among the best: nothing that is half looks whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_tp as ltp
from lightning_tp.checkpoint import Peers, StoragePath, candidates, select_intact
from lightning_tp.checkpoint.weights.open import open_checkpoint
from lightning_tp.checkpoint.weights.stored import StoredTensor
from lightning_tp.core import staging
from lightning_tp.testing import run_ranks
from tests.checkpoint.runs import Net, data, trainer
from tests.checkpoint.test_commit import fast_path as fast_path
from tests.checkpoint.test_commit import killed_at, save


def values(path: Path) -> set[float]:
    return {v for stored in open_checkpoint(path).model.values() for v in stored.read().unique().tolist()}


WAYS: dict[str, Callable[[Path, Path], Any]] = {
    "safetensors": lambda source, out: ltp.export(source, out, overwrite=True, max_shard_size=4000),
    "torch": lambda source, out: ltp.export(source, out, "torch", overwrite=True),
    "consolidate": lambda source, out: ltp.consolidate(source, out, overwrite=True),
}


@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize("exchange", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["exchange", "two renames"])
def test_killed_during_an_export(kind: str, exchange: bool, fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any call that changes the disk: `out` is the old one or the new one, and the next export tidies up."""
    if not exchange:
        monkeypatch.setattr(staging, "rename_exchange", lambda a, b: False)
    for step in (1, 2):
        save(fast_path / f"{step}.ckpt", step)
    out, seen, lost = fast_path / "out", set(), 0
    own = StoredTensor.read
    monkeypatch.setattr(StoredTensor, "read", lambda *args: (_tick(), own(*args))[1])  # while tensors are written
    for event in range(60):
        WAYS[kind](fast_path / "1.ckpt", out)
        killed = killed_at(event, lambda: WAYS[kind](fast_path / "2.ckpt", out))
        if out.exists():
            seen |= values(out)
            assert len(values(out)) == 1
        else:
            lost += 1
            with pytest.raises(ltp.TPError, match="already exists"):  # the next one brings it back
                ltp.export(fast_path / "2.ckpt", out)
            assert values(out) == {1.0}
        WAYS[kind](fast_path / "2.ckpt", out)
        assert values(out) == {2.0} and sorted(os.listdir(fast_path)) == ["1.ckpt", "2.ckpt", "out"]
        if not killed:
            break
    assert event > 5 and seen == {1.0, 2.0} and lost == (0 if exchange or kind != "safetensors" else 1)


def _tick() -> None:
    """One of the calls that `killed_at` counts, without an effect."""
    os.replace(__file__, __file__)


def run(folder: Path, **strategy: Any) -> dict[str, torch.Tensor]:
    """Eight steps, of which the two best are kept, and the last."""
    torch.manual_seed(0)
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=2, monitor="step", mode="max", save_last=True)
    trainer(keep, strategy=strategy, max_epochs=4).fit(net := Net(), data(), ckpt_path="last")
    return ltp.full_state_dict(net)


def alone(folder: Path, **strategy: Any) -> dict[str, torch.Tensor]:
    """In a process of its own, so that none is forked from one with a process group."""
    weights: dict[str, torch.Tensor] = run_ranks(partial(run, folder, **strategy), 1, init=False)[0]
    return weights


EVENTS = (9, 60)


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["folders", "files"])
@pytest.mark.parametrize("events", [EVENTS, pytest.param(range(0, 400, 3), marks=pytest.mark.slow)], ids=["some", "many"])
@pytest.mark.timeout(900)
def test_killed_during_saves_in_the_background(whole: bool, events: Any, fast_path: Path) -> None:
    """Also while an old one makes room: all that has a checkpoint's name is whole, there is never none again, and the run goes on to its end."""
    ref = alone(fast_path / "ref")
    options = {"async_checkpoint": True, "save_distributed_checkpoint": not whole}
    begun, killed = False, True
    for event in events:
        folder = fast_path / str(event)
        killed = killed_at(event, partial(run, folder, **options))
        left = candidates(StoragePath(folder))
        for place in left:
            assert select_intact(place, Peers(alone=True))[1] is None
        assert left or not begun
        begun = begun or bool(left)
        if killed and (event in EVENTS or event % 20 == 0):
            got = alone(folder, **options)
            assert all(torch.equal(t, ref[name]) for name, t in got.items())
            assert len(candidates(StoragePath(folder))) <= 5  # two more may be left of the best, whole
        if not killed:
            break
    assert begun and (killed or event > 60)
