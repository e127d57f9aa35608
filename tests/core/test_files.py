"""Paths that can't be written are refused before the work is done."""

from __future__ import annotations

from pathlib import Path

import pytest

import lightning_tp as ltp
from lightning_tp.core.files import check_file, write_text


def test_a_file_that_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    check_file(tmp_path / "new.txt")
    assert not (tmp_path / "new.txt").exists()
    write_text(tmp_path / "old.txt", "naïve")
    check_file(str(tmp_path / "old.txt"))
    assert (tmp_path / "old.txt").read_bytes() == "naïve".encode()


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ltp.TPError, match="`--out .*`: this is a folder; name a file"):
        check_file(tmp_path, "--out")
    with pytest.raises(ltp.TPError, match="`path .*`: there is no folder .*/none. Make it first"):
        check_file(tmp_path / "none" / "x")
    with pytest.raises(ltp.TPError, match="/none/x` can't be written: No such file or directory"):
        write_text(tmp_path / "none" / "x", "")

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ltp.TPError, match="it can't be written: Read-only file system"):
        check_file(tmp_path / "x")
