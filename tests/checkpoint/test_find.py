"""Damage is found, and named, before anything is loaded; the last and the best are those that are whole."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_tp as ltp
from lightning_tp import errors
from lightning_tp.checkpoint import Peers, SaveContent, StoragePath, save_file, save_folder, select_intact, to_bytes
from lightning_tp.testing import run_ranks
from tests.checkpoint.runs import Net, data, flip, trainer


def save(path: Path, step: int) -> None:
    save_folder(StoragePath(path), SaveContent({"w": torch.full((500,), float(step))}, rest=to_bytes({"step": step})), Peers())


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("__0_0.distcp", truncate, r"`__0_0\.distcp` has \d+ bytes, but its manifest says \d+"),
        ("__0_0.distcp", flip, r"`__0_0\.distcp` has checksum \w{8}, but its manifest says \w{8} \(CRC-32\)"),
        ("meta.pt", flip, r"`meta\.pt` has checksum"),
        (".metadata", Path.unlink, r"`\.metadata` is missing \(\d+ bytes\)"),
        ("manifest.json", truncate, r"manifest\.json` is damaged: it is no manifest"),
    ],
)
def test_what_is_damaged_is_named(name: str, spoil: Any, said: str, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path / f"step={step}.ckpt", step)
        os.utime(tmp_path / f"step={step}.ckpt" / "manifest.json", (step, step))
    spoil(tmp_path / "step=3.ckpt" / name)
    with pytest.raises(
        ltp.TPError,
        match=rf"step=3\.ckpt` is damaged: .*{said}.*Nothing was loaded.*intact checkpoint beside it is `.*step=2\.ckpt`",
    ):
        select_intact(StoragePath(tmp_path / "step=3.ckpt"), Peers())
    found, line = select_intact(StoragePath(tmp_path / "step=3.ckpt"), Peers(), instead=[])
    assert found.name == "step=2.ckpt" and "step=3.ckpt` is damaged" in line
    found, _ = select_intact(StoragePath(tmp_path / "step=3.ckpt"), Peers(), instead=[str(tmp_path / "step=1.ckpt")])
    assert found.name == "step=1.ckpt"
    shutil.rmtree(tmp_path / "step=1.ckpt")
    shutil.rmtree(tmp_path / "step=2.ckpt")
    with pytest.raises(ltp.TPError, match="no intact checkpoint beside it"):
        select_intact(StoragePath(tmp_path / "step=3.ckpt"), Peers(), instead=[])


@pytest.mark.parametrize("spoil", [truncate, flip])
def test_one_file_has_checksums_too(spoil: Any, tmp_path: Path) -> None:
    """Also one that Lightning wrote."""
    path = tmp_path / "a.ckpt"
    save_file(StoragePath(path), lambda stream: torch.save({"w": torch.rand(5000)}, stream))
    assert select_intact(StoragePath(path), Peers())[1] is None
    spoil(path)
    with pytest.raises(ltp.TPError, match=r"a\.ckpt` is damaged"):
        select_intact(StoragePath(path), Peers())


def test_a_folder_without_a_manifest_is_read_unchecked(tmp_path: Path) -> None:
    """Lightning's own."""
    save(tmp_path / "a.ckpt", 1)
    (tmp_path / "a.ckpt" / "manifest.json").unlink()
    flip(tmp_path / "a.ckpt" / "__0_0.distcp")
    assert select_intact(StoragePath(tmp_path / "a.ckpt"), Peers())[1] is None


def test_each_rank_checks_a_share(tmp_path: Path) -> None:
    def body() -> list[str]:
        from lightning_tp.checkpoint import find

        looked: list[str] = []
        own = find.damage_of_file
        find.damage_of_file = lambda folder, name, entry: looked.append(name) or own(folder, name, entry)
        w = {f"w{dist.get_rank()}": torch.ones(99)}
        save_folder(StoragePath(tmp_path / "a.ckpt"), SaveContent(w, rest=to_bytes({}) if dist.get_rank() == 0 else None), Peers())
        assert select_intact(StoragePath(tmp_path / "a.ckpt"), Peers())[1] is None
        whole = list(looked)
        if dist.get_rank() == 0:
            flip(tmp_path / "a.ckpt" / "__1_0.distcp")
        dist.barrier()
        with pytest.raises(ltp.TPError, match="__1_0"):  # all say what one has found
            select_intact(StoragePath(tmp_path / "a.ckpt"), Peers())
        return whole

    found = run_ranks(body, 2)
    assert sorted(found[0] + found[1]) == [".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt"] and all(found)


def test_the_last_and_the_best_of_a_trainer(tmp_path: Path) -> None:
    def callback(**options: Any) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1, save_last=True, **options)

    def resumed(word: Any) -> tuple[int, list[str]]:
        """From which step it went on, and what was said."""
        module = Net(seed=1)
        began: list[int] = []
        module.on_train_start = lambda: began.append(module.trainer.global_step)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(callback(), max_epochs=4, limit_train_batches=1 if word == "last" else 2).fit(module, data(), ckpt_path=word)
        return began[0], [str(w.message) for w in caught if "ckpt_path=" in str(w.message)]

    def body() -> None:
        rank = dist.get_rank() if dist.is_initialized() else int(os.environ["RANK"])
        first = trainer(callback(monitor="loss", mode="min"))
        first.fit(Net(), data())
        dist.barrier()
        backup = tmp_path.parent / "backup"
        if rank == 0:
            shutil.copytree(tmp_path, backup)
            for step in (1, 2, 3, 4):  # a copy has the time of now
                os.utime(tmp_path / f"step={step}.ckpt" / "manifest.json", (time.time() - 100 + step,) * 2)
            flip(tmp_path / "last.ckpt" / "__1_0.distcp")
        dist.barrier()

        # stopped between a checkpoint and `last`: nothing that was committed is lost
        if rank == 0:
            os.rename(tmp_path / "last.ckpt", tmp_path / "kept")
            shutil.copytree(tmp_path / "step=3.ckpt", tmp_path / "last.ckpt")
            os.utime(tmp_path / "last.ckpt" / "manifest.json", (time.time() - 97,) * 2)
        dist.barrier()
        module = Net(seed=1)
        trainer(callback(), max_epochs=2).fit(module, data(), ckpt_path="last")
        assert module.trainer.ckpt_path.endswith("step=4.ckpt")
        dist.barrier()
        if rank == 0:
            shutil.rmtree(tmp_path / "last-v1.ckpt", ignore_errors=True)
            shutil.rmtree(tmp_path / "last.ckpt")
            os.rename(tmp_path / "kept", tmp_path / "last.ckpt")
        dist.barrier()

        # by name: an error, before any weight is touched
        errors.HEAD_START = 0.0
        module = Net(seed=1)
        with pytest.raises((ltp.TPError, SystemExit)) as info:
            trainer().validate(module, data(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
        if rank == 0:
            assert "`__1_0.distcp` has checksum" in str(info.value) and "beside it is `" in str(info.value)
            assert "step=4.ckpt`" in str(info.value)
        before, now = Net(seed=1).state_dict(), ltp.full_state_dict(module)
        assert all(torch.equal(t, now[n]) for n, t in before.items())

        # as the best of this Trainer
        best = Path(first.checkpoint_callback.best_model_path)
        ranking = sorted(first.checkpoint_callback.best_k_models, key=lambda p: first.checkpoint_callback.best_k_models[p])
        if rank == 0:
            flip(best / "__0_0.distcp")
        dist.barrier()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            first.validate(Net(), data(), ckpt_path="best", verbose=False)
        said = [str(w.message) for w in caught if "ckpt_path='best'" in str(w.message)]
        assert (len(said) == 1 and f"`{ranking[1]}` is loaded instead" in said[0]) == (rank == 0)

        # as the last
        if rank == 0:
            shutil.copytree(backup / best.name, best, dirs_exist_ok=True)
            os.utime(best / "manifest.json", (time.time() - 50,) * 2) if best.name == "step=4.ckpt" else None
        dist.barrier()
        step, said = resumed("last")
        assert step == 4 and (len(said) == 1 and "last.ckpt` is damaged" in said[0]) == (rank == 0)

    run_ranks(body, 2, init=False)


def test_last_after_a_crash_between_two_renames(tmp_path: Path) -> None:
    """The name is nobody's for that moment, on a file system without an exchange; it is brought back."""

    def body() -> int:
        callback = ModelCheckpoint(tmp_path, save_last=True, filename="{step}")
        trainer(callback, max_epochs=1).fit(Net(), data())
        aside = tmp_path / ".lightning_tp"
        aside.mkdir()
        (tmp_path / "last.ckpt").rename(aside / "last.ckpt.replaced-0badcafe")
        module = Net(seed=1)
        again = trainer(ModelCheckpoint(tmp_path, save_last=True, filename="{step}"))
        module.on_train_start = lambda: began.append(module.trainer.global_step)
        began: list[int] = []
        again.fit(module, data(), ckpt_path="last")
        return began[0]

    assert run_ranks(body, 1, init=False) == [2]
