"""Saving beside training: the checkpoint is that of the instant when it was asked for, errors are seen, and nothing is left under way."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import lightning_tp as ltp
from lightning_tp.checkpoint import Background, HostCopy, Peers, StoragePath, commit, select_intact
from lightning_tp.testing import run_ranks
from tests.checkpoint.runs import Net, data, trainer


def test_one_at_a_time_and_errors_are_seen_once() -> None:
    background, go, done = Background(), threading.Event(), []
    background.start("Saving a", lambda: done.append(go.wait(10)))
    background.after(lambda: done.append("removed"))
    assert background.busy and not done
    go.set()
    background.wait()
    assert done == [True, "removed"] and not background.busy
    background.after(lambda: done.append("at once"))
    assert done[-1] == "at once"

    def fails() -> None:
        raise OSError("the disk is gone")

    background.start("Saving b", fails)
    background.after(lambda: done.append("never"))
    with pytest.raises(ltp.TPError, match="Saving b failed in the background: OSError: the disk is gone"):
        background.wait()
    background.wait()
    assert done[-1] == "at once"


def test_copies_have_memory_of_their_own() -> None:
    copies, t = HostCopy(), torch.ones(3)
    first = copies.of({"a": [t, (t, 1)]})
    t.zero_()
    assert first["a"][0].tolist() == first["a"][1][0].tolist() == [1, 1, 1] and first["a"][1][1] == 1
    again = copies.of({"a": [t, (t, 1)]})
    assert again["a"][0].data_ptr() == first["a"][0].data_ptr()


class Slow(Callback):
    """Saves become slow, and are counted; what is on the disk is looked at after each step."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.seen.append(
            (trainer.global_step, trainer.strategy.checkpoint_writer.busy, sorted(p.name for p in self.folder.glob("*.ckpt")))
        )


def test_a_run_with_checkpoints_in_the_background(tmp_path: Path) -> None:
    """What is saved is the state of that step, though training went on meanwhile; the one before goes away only when the next is there."""

    def body() -> Any:
        out = {}
        own = commit._write

        def slowly(*args: Any) -> None:
            time.sleep(0.3)
            own(*args)

        for kind, options in {"sync": {}, "async": dict(async_checkpoint=True)}.items():
            commit._write = slowly if kind == "async" else own
            for whole in (False, True):
                folder = tmp_path / f"{kind}{whole}"
                keep = ModelCheckpoint(
                    folder, filename="{step}", every_n_train_steps=1, save_last=True, enable_version_counter=False
                )
                look = Slow(folder)
                run = trainer(look, keep, strategy=dict(save_distributed_checkpoint=not whole, **options))
                run.fit(module := Net(), data())
                assert not run.strategy.checkpoint_writer.busy
                out[kind, whole] = look.seen if not whole else None
                dist.barrier()  # rank 0 may still be removing
                assert sorted(os.listdir(folder)) == ["last.ckpt", "step=4.ckpt"]
                restored = Net(seed=1)
                again = trainer()
                again.validate(restored, data(), ckpt_path=folder / "step=4.ckpt", verbose=False)
                now, then = ltp.full_state_dict(restored), ltp.full_state_dict(module)
                assert all(torch.equal(t, then[n]) for n, t in now.items())
                resumed = Net(seed=1)
                trainer(max_epochs=3).fit(resumed, data(), ckpt_path=folder / "last.ckpt")
                out[kind, whole, "weights"] = ltp.full_state_dict(resumed)
        return out

    found = run_ranks(body, 2, init=False)[0]
    for whole in (False, True):
        for name, t in found["sync", False, "weights"].items():
            assert torch.equal(t, found["async", whole, "weights"][name])
    assert any(busy for _, busy, _ in found["async", False]) and not any(busy for _, busy, _ in found["sync", False])
    assert all(names for step, _, names in found["async", False] if step > 2)  # never none at all


def test_an_error_is_raised_at_the_next_save_or_at_the_end(tmp_path: Path) -> None:
    def body() -> None:
        own = commit._write
        fails: list[int] = []

        def write(*args: Any) -> None:
            fails.append(1)
            if len(fails) == 2:
                raise OSError(28, "No space left on device")
            own(*args)

        commit._write = write
        for mode, every in (("next", 1), ("end", 3), ("warn", 1)):
            fails.clear()
            folder = tmp_path / mode
            keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=1)
            strategy = dict(async_checkpoint=True, on_save_error="warn" if mode == "warn" else "raise")
            run = trainer(keep, strategy=strategy, max_steps=6, max_epochs=-1)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if mode == "warn":
                    run.fit(Net(), data())
                else:
                    with pytest.raises(ltp.TPError, match=r"no space is left.*in the background"):
                        run.fit(Net(), data())
            said = [str(w.message) for w in caught if "no space is left" in str(w.message)]
            assert run.global_step == {"next": 3, "end": 6, "warn": 6}[mode]
            assert len(said) == (1 if mode == "warn" and dist.get_rank() == 0 else 0), said
            dist.barrier()  # rank 0 may still be removing
            left = sorted(p.name for p in folder.iterdir())
            # what the failed one was to take the place of is kept
            assert left == {"next": ["step=1.ckpt"], "end": ["step=3.ckpt"], "warn": ["step=1.ckpt", "step=6.ckpt"]}[mode], (
                mode,
                left,
            )
            for name in left:
                assert select_intact(StoragePath(folder / name), Peers())[1] is None

    run_ranks(body, 2, init=False)


SCRIPT = """
import sys, time
from pathlib import Path
from lightning_tp.checkpoint import commit
from tests.checkpoint.runs import Net, data, trainer
own = commit._write
def slowly(*args):
    time.sleep(1)
    own(*args)
commit._write = slowly
class Stops(Net):
    def on_train_batch_end(self, *args):
        self.trainer.save_checkpoint(sys.argv[1])
        {how}
trainer(strategy=dict(async_checkpoint=True)).fit(Stops(), data())
"""


@pytest.mark.parametrize("how", [pytest.param("sys.exit(3)", marks=pytest.mark.slow), "raise KeyError('mine')"])
def test_the_process_does_not_end_with_a_save_under_way(how: str, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    env = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(how=how), str(path)],
        capture_output=True,
        text=True,
        env=env,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == (3 if "exit" in how else 1), done.stderr
    assert ("KeyError: 'mine'" in done.stderr) == ("KeyError" in how)
    assert select_intact(StoragePath(path), Peers())[1] is None
