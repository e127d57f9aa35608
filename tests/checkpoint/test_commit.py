"""A save is there whole or not at all, whenever and on whichever rank it is stopped; and it removes nothing that is not its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import lightning_tp as ltp
from lightning_tp.checkpoint import (
    Manifest,
    Peers,
    SaveContent,
    StoragePath,
    candidates,
    commit,
    load,
    remove,
    save_file,
    save_folder,
    select_intact,
    to_bytes,
)
from lightning_tp.checkpoint.commit import recover
from lightning_tp.checkpoint.storage.dcp import FolderFiles
from lightning_tp.core import staging
from lightning_tp.testing import run_ranks
from tests.checkpoint.store import OPTIONS
from tests.checkpoint.store import stores as stores

SIZE = 3000


def content(step: int, size: int = SIZE) -> SaveContent:
    rank = Peers().rank
    whole = {"state_dict": {f"w{rank}": torch.full((size,), float(step))}, "optimizer_0": {"lr": 0.1}}
    return SaveContent(whole, rest=to_bytes({"step": step}) if rank == 0 else None, plan="{}", about=Manifest(step=step))


def step_of(place: StoragePath) -> int:
    """Of a checkpoint that is whole."""
    found, said = select_intact(place, Peers())
    assert said is None
    return int(load(found / "meta.pt")["step"] if found.is_dir() else load(found)["step"])


def save(path: Path, step: int, *, folder: bool = True) -> None:
    if folder:
        save_folder(StoragePath(path), content(step), Peers())
    else:
        save_file(StoragePath(path), lambda stream: torch.save({"step": step, "w": torch.ones(SIZE)}, stream))


RENAME_EXCHANGE = staging.rename_exchange
KILLED_AT = ("rename", "replace", "fsync", "unlink", "rmdir", "mkdir")


def killed_at(event: int, work: Callable[[], None]) -> bool:
    """Run `work` in a process that is killed before this call that changes the disk; False if it has come to its end first."""
    pid = os.fork()
    if pid == 0:
        left = [event]

        def guard(own: Any) -> Any:
            def guarded(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return own(*args, **kwargs)

            return guarded

        for name in KILLED_AT:
            setattr(os, name, guard(getattr(os, name)))
        if staging.rename_exchange is RENAME_EXCHANGE:
            staging.rename_exchange = guard(RENAME_EXCHANGE)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two renames":  # a file system that can't exchange two names
        monkeypatch.setattr(staging, "rename_exchange", lambda a, b: False)
    return request.param


@pytest.fixture
def fast_path(tmp_path: Path) -> Iterator[Path]:
    """In memory, where there is such a disk: `fsync` costs nothing there."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as path:
        yield Path(path)


OTHERS = [pytest.param(kinds, marks=pytest.mark.slow) for kinds in ((True, False), (False, True), (False, False))]


@pytest.mark.parametrize("kinds", [(True, True), *OTHERS], ids=["dd", "df", "fd", "ff"])
def test_killed_at_any_instant(way: str, kinds: tuple[bool, bool], fast_path: Path) -> None:
    """Over an existing name: the old one or the new one is there, whole; what is left goes away with the next save."""
    path, seen = fast_path / "last.ckpt", set()
    for event in range(100):
        remove(StoragePath(path))
        save(path, 1, folder=kinds[0])
        (fast_path / "mine.txt").write_text("keep")
        killed = killed_at(event, lambda: save(path, 2, folder=kinds[1]))
        assert [c.name for c in candidates(StoragePath(fast_path))] == ["last.ckpt"]
        recover(StoragePath(path))
        seen.add(step_of(StoragePath(path)))
        names = set(os.listdir(fast_path)) - {"last.ckpt", "mine.txt"}
        assert names <= {".lightning_tp"}
        save(path, 3)
        assert step_of(StoragePath(path)) == 3
        assert sorted(os.listdir(fast_path)) == ["last.ckpt", "mine.txt"]
        if not killed:
            break
    assert event > 5 and seen == {1, 2}


@pytest.mark.parametrize("way", ["exchange"], indirect=True)
def test_a_commit_is_on_the_disk(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file and each folder of it is flushed before the name changes hands, and the folder with the name after that."""
    calls: list[str] = []
    for name, shown in (
        ("fsync", lambda fd: os.readlink(f"/proc/self/fd/{fd}")),
        ("rename_exchange", lambda new, old: f"{new} {old}"),
    ):
        owner = os if name == "fsync" else staging
        own = getattr(owner, name)

        def watched(*args: Any, name: str = name, shown: Any = shown, own: Any = own) -> Any:
            calls.append(f"{name} {shown(*args)}")
            return own(*args)

        monkeypatch.setattr(owner, name, watched)
    target = tmp_path / "last.ckpt"
    save(target, 1)
    calls.clear()
    with_apart = content(2)
    with_apart.apart["mine"] = torch.ones(3)  # in a folder inside
    save_folder(StoragePath(target), with_apart, Peers())
    (renamed,) = [call for call in calls if call.startswith("rename_exchange")]
    new = renamed.split()[1]
    before, after = calls[: calls.index(renamed)], calls[calls.index(renamed) + 1 :]
    files = [p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()]
    assert {"meta.pt", "manifest.json", ".metadata", "__0_0.distcp", "lightning_tp_sharded/__0_0.distcp"} < set(files)
    of_torch = {call.replace(".metadata.tmp", ".metadata") for call in before}  # renamed by torch once it is flushed
    assert {f"fsync {new}/{file}" for file in files} <= of_torch
    assert before[-3:] == [f"fsync {new}/lightning_tp_sharded", f"fsync {new}", f"fsync {os.path.dirname(new)}"]
    assert after == [f"fsync {tmp_path}"]


def test_killed_during_a_removal(tmp_path: Path) -> None:
    path, other = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    for event in range(20):
        save(path, 1)
        killed = killed_at(event, lambda: remove(StoragePath(path)))
        if path.exists():
            assert step_of(StoragePath(path)) == 1
        save(other, 2)
        assert not (tmp_path / ".lightning_tp").exists()
        if not killed:
            break
    assert not path.exists() and event > 1
    remove(StoragePath(path))  # again is no harm


def test_a_rank_that_can_not_write(tmp_path: Path) -> None:
    """All ranks raise one error, the checkpoint before it stays, and nothing else is left."""

    def body() -> None:
        target = StoragePath(tmp_path / "last.ckpt")
        save_folder(target, content(1), Peers())
        if dist.get_rank() == 1:
            own = FolderFiles.create_stream

            def fails(self: Any, path: Any, mode: str) -> Any:
                if "w" in mode:
                    raise PermissionError(13, "Permission denied", str(path))
                return own(self, path, mode)

            FolderFiles.create_stream = fails
        with pytest.raises(
            ltp.TPError, match=r"last\.ckpt` could not be written: PermissionError.*Earlier checkpoints are untouched"
        ):
            save_folder(target, content(2), Peers())
        dist.barrier()
        assert step_of(target) == 1
        assert os.listdir(tmp_path) == ["last.ckpt"]

    run_ranks(body, 2)


def test_a_file_that_arrived_in_part_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The length that its writer counted is compared with what is there before the commit."""
    own = FolderFiles.write

    def cut_off(self: FolderFiles, name: str, data: bytes) -> None:
        own(self, name, data)
        os.truncate(os.path.join(self.folder.path, name), len(data) - 1)

    target = StoragePath(tmp_path / "last.ckpt")
    save_folder(target, content(1), Peers())
    monkeypatch.setattr(FolderFiles, "write", cut_off)
    with pytest.raises(ltp.TPError, match=r"another rank wrote `meta\.pt`, which rank 0 does not see"):
        save_folder(target, content(2), Peers())
    assert step_of(target) == 1


def test_only_its_own_leftovers_are_removed(tmp_path: Path) -> None:
    aside = tmp_path / ".lightning_tp"
    for name in ("last.ckpt.saving-0badcafe", "other.ckpt.saving-0badcafe", "last.ckpt.mine"):
        (aside / name).mkdir(parents=True)
    save(tmp_path / "last.ckpt", 1)
    assert sorted(os.listdir(aside)) == ["last.ckpt.mine", "other.ckpt.saving-0badcafe"]


def test_a_folder_with_other_things_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "run"
    save(target, 1)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ltp.TPError, match=r"other things in it than a checkpoint \(`notes\.txt`\)"):
        save(target, 2)
    assert step_of(StoragePath(target)) == 1 and (target / "notes.txt").exists()
    (target / "notes.txt").unlink()
    save(target, 2)
    assert step_of(StoragePath(target)) == 2


def test_a_link_is_replaced_not_what_it_shows(tmp_path: Path) -> None:
    """`ModelCheckpoint(save_last="link")`, then without."""
    save(tmp_path / "step=1.ckpt", 1)
    (tmp_path / "last.ckpt").symlink_to("step=1.ckpt")
    save(tmp_path / "last.ckpt", 2)
    assert not (tmp_path / "last.ckpt").is_symlink()
    assert [step_of(StoragePath(tmp_path / n)) for n in ("last.ckpt", "step=1.ckpt")] == [2, 1]
    (tmp_path / "link.ckpt").symlink_to("step=1.ckpt")
    remove(StoragePath(tmp_path / "link.ckpt"))
    assert step_of(StoragePath(tmp_path / "step=1.ckpt")) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk can't be mounted: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    def body() -> None:
        target = StoragePath(small_disk / "last.ckpt")
        save_folder(target, content(1), Peers())
        with pytest.raises(ltp.TPError) as info:
            save_folder(target, content(2, 60_000), Peers())  # 240 kB each
        assert re.search(
            r"last\.ckpt` could not be written: no space left on the disk \(a rank had written [\d,]+ bytes", str(info.value)
        )
        assert step_of(target) == 1
        dist.barrier()
        save_folder(target, content(3), Peers())  # there is room again
        assert step_of(target) == 3
        if dist.get_rank() == 0:
            with pytest.raises(ltp.TPError, match="no space left"):
                save_file(StoragePath(small_disk / "one.ckpt"), lambda stream: torch.save(torch.ones(200_000), stream))
            assert os.listdir(small_disk) == ["last.ckpt"]

    run_ranks(body, 2)


# ----------------------------------------------------------------------------------------------------- other file systems


def store_content(step: int) -> SaveContent:
    rest = to_bytes({"step": step}) if Peers().rank == 0 else None
    return SaveContent({f"w{Peers().rank}": torch.full((50,), float(step))}, rest=rest)


def test_a_store_without_renames(tmp_path: Path) -> None:
    """The manifest comes last; until then the folder is refused."""

    def body() -> None:
        place = StoragePath(f"store://{tmp_path}/a.ckpt", OPTIONS)
        save_folder(place, store_content(1), Peers())
        assert load(select_intact(place, Peers())[0] / "meta.pt") == {"step": 1}
        assert sorted(place.names()) == [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "meta.pt"]
        dist.barrier()
        own = commit._commit_folder
        if dist.get_rank() == 0:

            def stops(*args: Any) -> None:
                raise OSError("the connection broke")

            commit._commit_folder = stops
        with pytest.raises(ltp.TPError, match=r"store://.*a\.ckpt` could not be written: OSError: the connection broke"):
            save_folder(place, store_content(2), Peers())
        with pytest.raises(ltp.TPError, match="its save was never completed: there is no manifest"):
            select_intact(place, Peers())
        commit._commit_folder = own
        save_folder(place, store_content(3), Peers())
        assert load(select_intact(place, Peers())[0] / "meta.pt") == {"step": 3}

    run_ranks(body, 2)


def test_a_disk_that_is_not_shared() -> None:
    """Each rank has a memory of its own: seen before anything is committed."""

    def body() -> None:
        with pytest.raises(ltp.TPError, match=r"another rank wrote `__1_0\.distcp`, which rank 0 does not see"):
            save_folder(StoragePath("memory://a.ckpt"), store_content(1), Peers())

    run_ranks(body, 2)
