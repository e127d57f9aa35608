"""Checkpoints on other file systems than the local one: URLs, options, stores that can't rename."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_tp as ltp
from lightning_tp.checkpoint import Peers, SaveContent, StoragePath, commit, load, save_file, save_folder, select_intact
from lightning_tp.testing import run_ranks
from tests.checkpoint.runs import Net, data, trainer


class Store(LocalFileSystem):
    """As object stores are: files appear whole, and there are no renames. Wants a key. It lies on the disk, so that all ranks see it."""

    protocol = "store"
    cachable = False

    def __init__(self, key: str = "", **options: Any) -> None:
        super().__init__(auto_mkdir=True, **options)
        if key != "secret":
            raise PermissionError("no key")

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return LocalFileSystem._strip_protocol(os.fspath(path).removeprefix("store://"))


@pytest.fixture(autouse=True)
def stores() -> Any:
    fsspec.register_implementation("store", Store, clobber=True)
    fsspec.filesystem("memory").store.clear()


OPTIONS = {"key": "secret"}


def content(step: int) -> SaveContent:
    rest = commit.to_bytes({"step": step}) if Peers().rank == 0 else None
    return SaveContent({f"w{Peers().rank}": torch.full((50,), float(step))}, rest=rest)


def test_a_store_without_renames(tmp_path: Path) -> None:
    """The manifest comes last; until then the folder is refused."""

    def body() -> None:
        place = StoragePath(f"store://{tmp_path}/a.ckpt", OPTIONS)
        save_folder(place, content(1), Peers())
        assert load(select_intact(place, Peers())[0] / "meta.pt") == {"step": 1}
        assert sorted(place.names()) == [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "meta.pt"]
        dist.barrier()
        own = commit._commit_folder
        if dist.get_rank() == 0:

            def stops(*args: Any) -> None:
                raise OSError("the connection broke")

            commit._commit_folder = stops
        with pytest.raises(ltp.TPError, match=r"store://.*a\.ckpt` could not be written: OSError: the connection broke"):
            save_folder(place, content(2), Peers())
        with pytest.raises(ltp.TPError, match="begun, and never completed"):
            select_intact(place, Peers())
        commit._commit_folder = own
        save_folder(place, content(3), Peers())
        assert load(select_intact(place, Peers())[0] / "meta.pt") == {"step": 3}

    run_ranks(body, 2)


def test_a_disk_that_is_not_shared() -> None:
    """Each rank has a memory of its own: seen before anything is committed."""

    def body() -> None:
        with pytest.raises(ltp.TPError, match=r"another rank has written `__1_0\.distcp`, which rank 0 does not see"):
            save_folder(StoragePath("memory://a.ckpt"), content(1), Peers())

    run_ranks(body, 2)


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
    assert StoragePath(tmp_path / "a.ckpt").has("manifest.json")


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
