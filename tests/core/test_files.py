"""Files of this machine: checked before the work, written, flushed, removed."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

import lightning_tp as ltp
from lightning_tp.core import files


def test_a_path_is_checked_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ltp.TPError, match=r"`--html .*`: this is a folder\. Give the name of a file"):
        files.check_file(tmp_path, "--html")
    with pytest.raises(ltp.TPError, match=rf"`path .*`: there is no folder {tmp_path}/none\. Create it first"):
        files.check_file(tmp_path / "none" / "a")
    with pytest.raises(ltp.TPError, match=r"`path /proc/none`: it can't be written"):
        files.check_file("/proc/none")
    files.check_file(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").write_text("kept")
    files.check_file(tmp_path / "old")
    assert (tmp_path / "old").read_text() == "kept"


def test_text_is_written_in_utf8(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a", "é 模")
    assert (tmp_path / "a").read_bytes() == "é 模".encode()
    with pytest.raises(ltp.TPError, match=r"/none/a` can't be written: No such file or directory"):
        files.write_text(tmp_path / "none" / "a", "")


@pytest.mark.parametrize(
    ("what", "code", "raises"),
    [("folder", errno.EINVAL, False), ("folder", errno.EIO, True), ("folder", errno.ENOSPC, True), ("file", errno.EINVAL, True)],
)
def test_a_disk_that_fails_is_not_passed_over(what: str, code: int, raises: bool, tmp_path: Path, monkeypatch: Any) -> None:
    """Some file systems can't flush a folder (EINVAL); a full or broken disk is an error."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()

    def fails(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fails)
    if raises:
        with pytest.raises(OSError, match=os.strerror(code)):
            files.fsync(tmp_path / what)
    else:
        files.fsync(tmp_path / what)


def test_whatever_it_is_is_removed(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("folder")
    for name in ("link", "file", "none", "file/inside"):
        files.remove(tmp_path / name)
    assert os.listdir(tmp_path) == ["folder"], "not what the link shows"
    files.remove(tmp_path / "folder")
    assert not os.listdir(tmp_path)
