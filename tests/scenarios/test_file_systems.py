"""Runs whose checkpoints are on other file systems than the local one: URLs, options. Commits to stores: `checkpoint/test_commit.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_tp.checkpoint import Peers, StoragePath, load, save_file, select_intact
from lightning_tp.testing import run_ranks
from tests.checkpoint.runs import Net, data, trainer
from tests.checkpoint.store import OPTIONS
from tests.checkpoint.store import stores as stores


@pytest.mark.parametrize("whole", [False, True])
def test_a_run(whole: bool) -> None:
    folder = "memory://runs"

    def body() -> tuple[int, list[str]]:
        def keep() -> ModelCheckpoint:
            return ModelCheckpoint(
                folder, filename="{step}", monitor="val_loss", save_top_k=1, save_last=True, enable_version_counter=False
            )

        strategy = dict(save_distributed_checkpoint=not whole)
        run = trainer(keep(), strategy=strategy, max_epochs=3)
        run.fit(Net(), data(), data())
        run.validate(Net(seed=1), data(), ckpt_path="best", verbose=False)
        names = [n for n in StoragePath(folder).names() if n.endswith(".ckpt")]
        again = trainer(keep(), strategy=strategy, max_epochs=4)
        module = Net(seed=1)
        module.on_train_start = lambda: began.append(module.trainer.global_step)
        began: list[int] = []
        again.fit(module, data(), data(), ckpt_path="last")
        return began[0], names

    assert run_ranks(body, 1, init=False)[0] == (6, ["last.ckpt", "step=6.ckpt"])


def test_the_protocol_of_files(tmp_path: Path) -> None:
    """`ModelCheckpoint("file://..")` takes that for a relative path; `save_checkpoint` and `ckpt_path` are ours."""

    def body() -> int:
        run = trainer(max_epochs=1)
        run.fit(Net(), data())
        run.save_checkpoint(f"file://{tmp_path}/a.ckpt")
        again = trainer()
        again.fit(Net(seed=1), data(), ckpt_path=f"file://{tmp_path}/a.ckpt")
        return again.global_step

    assert run_ranks(body, 2, init=False)[0] == 4
    assert (tmp_path / "a.ckpt" / "manifest.json").is_file()


def test_options_of_the_storage(tmp_path: Path) -> None:
    def body() -> None:
        run = trainer(max_epochs=1)
        run.fit(Net(), data())
        with pytest.raises(PermissionError):
            StoragePath(f"store://{tmp_path}/b.ckpt")
        run.save_checkpoint(f"store://{tmp_path}/a.ckpt", storage_options=OPTIONS)
        assert select_intact(StoragePath(f"store://{tmp_path}/a.ckpt", OPTIONS), Peers())[1] is None
        save_file(StoragePath(f"store://{tmp_path}/one.ckpt", OPTIONS), lambda stream: torch.save({"a": 1}, stream))
        assert load(StoragePath(f"store://{tmp_path}/one.ckpt", OPTIONS)) == {"a": 1}

    run_ranks(body, 1, init=False)
