"""What is written beside and renamed: flushed in the right order, all there or nothing. Kills are in `checkpoint/test_commit.py`."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_tp.core import staging
from lightning_tp.core.staging import ASIDE, begin, recover, recoverable, remove_at_once, staged


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is flushed and renamed, in order, by paths below `tmp_path`; a token is written as `*`."""
    seen: list[str] = []

    def shown(path: Any) -> str:
        name = os.path.relpath(path, tmp_path)
        head, mark, tail = name.partition("-")
        return f"{head}-*{'/' + tail.partition('/')[2] if '/' in tail else ''}" if mark else name

    def watch(owner: Any, name: str, show: Callable[..., str]) -> None:
        own = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (seen.append(f"{name} {show(*args)}"), own(*args))[1])

    watch(os, "fsync", lambda descriptor: shown(os.readlink(f"/proc/self/fd/{descriptor}")))
    for owner, name in ((os, "replace"), (os, "rename"), (staging, "rename_exchange")):
        watch(owner, name, lambda a, b: f"{shown(a)} {shown(b)}")
    return seen


def write(target: Path, text: str, *, folder: bool = True) -> None:
    with staged(target, folder=folder) as path:
        if folder:
            (path / "inside").mkdir()
            (path / "inside" / "b").write_text(text)
        else:
            path.write_text(text)


def content(target: Path) -> str:
    return (target if target.is_file() else target / "inside" / "b").read_text()


def test_all_is_flushed_before_the_name_changes_hands(calls: list[str], tmp_path: Path) -> None:
    """The file, each folder around it up to where the new name is, and after the rename the folder with the name."""
    new = f"{ASIDE}/out.saving-*"
    write(tmp_path / "out", "1")
    flushed = [f"fsync {new}/inside/b", f"fsync {new}/inside", f"fsync {new}", f"fsync {ASIDE}"]
    assert calls == [*flushed, f"replace {new} out", "fsync ."]
    calls.clear()
    write(tmp_path / "out", "2")
    assert calls == [*flushed, f"rename_exchange {new} out", "fsync ."]
    calls.clear()
    write(tmp_path / "file", "3", folder=False)
    new = f"{ASIDE}/file.saving-*"
    assert calls == [f"fsync {new}", f"fsync {ASIDE}", f"replace {new} file", "fsync ."]
    assert content(tmp_path / "out") == "2" and sorted(os.listdir(tmp_path)) == ["file", "out"]


def test_two_renames_where_names_can_not_be_exchanged(calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "rename_exchange", lambda a, b: False)
    write(tmp_path / "out", "1")
    calls.clear()
    write(tmp_path / "out", "2", folder=False)
    new, old = f"{ASIDE}/out.saving-*", f"{ASIDE}/out.replaced-*"
    assert calls[-3:] == [f"rename out {old}", f"rename {new} out", "fsync ."]
    assert content(tmp_path / "out") == "2" and os.listdir(tmp_path) == ["out"]


def test_the_old_one_gets_its_name_back_if_the_second_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "rename_exchange", lambda a, b: False)
    write(tmp_path / "out", "1")
    own = os.rename

    def fails(a: Any, b: Any) -> None:
        if ".saving-" in str(a):
            raise OSError(5, "Input/output error")
        own(a, b)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "out", "2")
    assert content(tmp_path / "out") == "1" and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("folder", [True, False])
def test_an_error_leaves_nothing(folder: bool, tmp_path: Path) -> None:
    write(tmp_path / "out", "1")
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "out", folder=folder) as path:
        (path / "part" if folder else path).write_text("half")
        raise KeyboardInterrupt
    assert content(tmp_path / "out") == "1" and os.listdir(tmp_path) == ["out"]


def test_what_a_crash_left_goes_away_and_nothing_else(tmp_path: Path) -> None:
    aside = tmp_path / ASIDE
    for name in ("out.saving-0badcafe", "other.saving-0badcafe", "other.removed-0badcafe", "out.mine", "out.saving-0.x"):
        (aside / name).mkdir(parents=True)
    write(tmp_path / "out", "1")
    assert sorted(os.listdir(aside)) == ["other.saving-0badcafe", "out.mine", "out.saving-0.x"]


def test_what_another_process_writes_now_is_left_alone_if_targets_are_shared(tmp_path: Path) -> None:
    """A process that has ended, or this one, does not write any more; one of another machine may."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    parent, here, elsewhere = os.getppid(), staging._machine(), "00000000"
    tokens = {
        "alive": f"{here}-{parent}-0",
        "ended": f"{here}-{ended.pid}-0",
        "own": f"{here}-{os.getpid()}-0",
        "far": f"{elsewhere}-1-0",
    }

    def left(shared: bool) -> set[str]:
        for token in tokens.values():
            (tmp_path / ASIDE / f"out.saving-{token}").mkdir(parents=True, exist_ok=True)
        mine = begin(tmp_path / "out", folder=True, shared=shared)
        assert mine.path.name.startswith(f"out.saving-{here}-{os.getpid()}-")
        mine.discard()
        return {name for name, token in tokens.items() if (tmp_path / ASIDE / f"out.saving-{token}").exists()}

    assert left(shared=True) == {"alive", "far"}
    assert left(shared=False) == set()


def test_a_name_that_a_crash_took_away_is_given_back(tmp_path: Path) -> None:
    """To the old one, unless the new one is known to be complete; and not while another process may be between its two renames."""
    out, aside = tmp_path / "out", tmp_path / ASIDE

    def crashed(token: str = "0badcafe") -> None:
        for text in ("old", "new"):
            write(tmp_path / text, text)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for name, text in (("replaced", "old"), ("saving", "new")):
            (tmp_path / text).rename(aside / f"out.{name}-{token}")

    crashed()
    assert recoverable(tmp_path) == ["out"]
    recover(out)
    assert content(out) == "old" and recoverable(tmp_path) == []
    recover(out, lambda new: True)
    assert content(out) == "old", "it has its name"
    remove_at_once(out)
    crashed()
    recover(out, lambda new: content(new) == "new")
    assert content(out) == "new"
    remove_at_once(out)
    crashed(f"{staging._machine()}-{os.getppid()}-0")
    recover(out, shared=True)
    assert not out.exists()
    begin(out, folder=True).discard()
    assert content(out) == "old", "`begin` does not remove the only one"


def test_a_name_is_free_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", "1")
    own = staging.files.remove

    def remove(path: Any) -> None:
        assert not (tmp_path / "out").exists() and ".removed-" in str(path)
        own(path)

    monkeypatch.setattr(staging.files, "remove", remove)
    remove_at_once(tmp_path / "out")
    remove_at_once(tmp_path / "out")
    assert not os.listdir(tmp_path)


def test_two_names_change_places(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("a")
    b.mkdir()
    if staging.rename_exchange(str(a), str(b)):
        assert a.is_dir() and b.read_text() == "a"
    with pytest.raises(FileNotFoundError):
        if not staging.rename_exchange(str(a), str(tmp_path / "missing")):
            raise FileNotFoundError
