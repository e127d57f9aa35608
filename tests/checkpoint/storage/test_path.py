"""Paths of checkpoints: on this machine and in other file systems; what can't be one is named."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from lightning.fabric.strategies.fsdp import _METADATA_FILENAME
from torch.distributed.checkpoint.filesystem import _metadata_fn

import lightning_tp as ltp
from lightning_tp.checkpoint.storage import path
from lightning_tp.checkpoint.storage.path import StoragePath, local_path, permission_errors
from tests.checkpoint.store import OPTIONS
from tests.checkpoint.store import stores as stores


def test_a_path_is_where_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the process goes elsewhere while a save is under way."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    place = StoragePath("a.ckpt")
    monkeypatch.chdir(tmp_path / "elsewhere")
    inside, beside = place / "meta.pt", place.parent
    assert inside.path == str(tmp_path / "a.ckpt" / "meta.pt") and beside.path == str(tmp_path)
    assert str(place) == "a.ckpt", "as the user knows it"


@pytest.mark.parametrize("url", ["{tmp}/runs", "file://{tmp}/runs", "store://{tmp}/runs", "memory://runs"])
def test_the_same_on_any_file_system(url: str, tmp_path: Path) -> None:
    options = OPTIONS if url.startswith("store") else None
    folder = StoragePath(url.format(tmp=tmp_path), options)
    file = folder / "inside" / "a.ckpt"
    assert folder.is_local == url.startswith(("{", "file")) and not folder.is_dir() and folder.names() == []
    (folder / "inside").make()
    with file.open("wb") as stream:
        stream.write(b"12345")
    assert file.name == "a.ckpt" and file.parent.path == f"{folder.path}/inside" and file.parent.options == options
    assert file.is_file() and not file.is_dir() and folder.is_dir() and not folder.is_file()
    assert file.read() == b"12345" and file.size() == 5 and abs(file.modified() - time.time()) < 60
    assert folder.names() == ["inside"] and file.names() == []
    assert (file.parent / "a.ckpt").is_file() and not (file.parent / "b.ckpt").is_file()
    folder.remove()
    folder.remove()
    assert not folder.is_dir()


def test_what_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ltp.TPError, match=r"`foo://x`: unknown file system \(Protocol not known: foo\)"):
        StoragePath("foo://x")
    Path("loop").symlink_to("loop")
    for text, says in (
        ("", "'' is not a valid path"),
        ("a\0b", "is not a valid path"),
        ("s3://x/a.ckpt", "is a URL; this takes local files only"),
        ("s3:/x/a.ckpt", "is a URL"),
        ("n" * 300, f"`{'n' * 200}..` can't be opened: File name too long"),
        ("loop/x", "can't be opened: Too many levels of symbolic links"),
    ):
        with pytest.raises(ltp.TPError, match=says):
            local_path(text)
    assert local_path("none/at all") == Path("none/at all") and local_path(tmp_path) == tmp_path


def test_what_may_not_be_read_is_named(tmp_path: Path) -> None:
    for named, says in (("there", "`there` can't be read: no"), (None, f"`{tmp_path}` can't be read: no")):
        with pytest.raises(ltp.TPError, match=says), permission_errors(tmp_path):
            raise PermissionError(13, "no", named)
    with pytest.raises(OSError, match="other"), permission_errors(tmp_path):
        raise OSError(5, "other")


def test_names_of_torch_and_lightning() -> None:
    assert _metadata_fn == path.METADATA and path.META == _METADATA_FILENAME


def test_all_names_are_ours_to_replace() -> None:
    """`commit.py` refuses to replace a folder with other names in it."""
    assert {value for name, value in vars(path).items() if name.isupper() and isinstance(value, str)} == path.NAMES
