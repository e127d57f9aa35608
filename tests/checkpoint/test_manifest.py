"""The manifest: what it says, and that something else is not taken for one."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
import torch

import lightning_tp as ltp
from lightning_tp.checkpoint import StoragePath
from lightning_tp.checkpoint.manifest import Manifest, damage_of_archive, damage_of_file, read
from lightning_tp.testing import run_ranks
from tests.checkpoint.runs import Net, data, trainer


def test_what_a_run_writes(tmp_path: Path) -> None:
    """The format that is documented: every file with its length and sum."""

    def body() -> None:
        run = trainer(max_epochs=1)
        run.fit(Net(), data())
        run.save_checkpoint(tmp_path / "a.ckpt")
        run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)

    run_ranks(body, 2, init=False)
    folder = tmp_path / "a.ckpt"
    said = json.loads((folder / "manifest.json").read_text())
    assert [said[k] for k in ("format", "step", "epoch", "weights_only")] == [1, 2, 1, False]
    assert said["mesh"] == {"data_parallel": 1, "tensor_parallel": 2}
    assert set(said["versions"]) == {"torch", "lightning", "lightning_tp"} and said["versions"]["torch"] == torch.__version__
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.name != "manifest.json"}
    assert said["files"] == {name: {"bytes": len(b), "crc32": f"{zlib.crc32(b):08x}"} for name, b in files.items()}
    assert {".metadata", "meta.pt", "plan.json", "__0_0.distcp", "__1_0.distcp"} == set(files)
    assert read(StoragePath(tmp_path / "weights.ckpt")).weights_only


def test_a_file_is_held_against_its_entry(tmp_path: Path) -> None:
    """Its length at once, its checksum if that is asked for."""
    folder, entry = StoragePath(tmp_path), {"bytes": 3, "crc32": f"{zlib.crc32(b'abc'):08x}"}
    assert damage_of_file(folder, "a", entry) == "`a` is missing (3 bytes)"
    (tmp_path / "a").write_bytes(b"abc")
    assert damage_of_file(folder, "a", entry) is None
    (tmp_path / "a").write_bytes(b"abd")
    assert damage_of_file(folder, "a", entry, checksums=False) is None
    assert (
        damage_of_file(folder, "a", entry) == f"`a` has checksum {zlib.crc32(b'abd'):08x}, but its manifest says 352441c2 (CRC-32)"
    )
    (tmp_path / "a").write_bytes(b"abcd")
    assert damage_of_file(folder, "a", entry, checksums=False) == "`a` has 4 bytes, but its manifest says 3"


def test_an_archive_is_checked_in_shares(tmp_path: Path) -> None:
    """Each rank reads some of its records; together they read all."""
    file = tmp_path / "a.ckpt"
    torch.save({"w": torch.rand(2000)}, file)
    whole = file.read_bytes()
    assert [damage_of_archive(StoragePath(file), rank, 3) for rank in range(3)] == [None] * 3
    file.write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    found = [damage_of_archive(StoragePath(file), rank, 3) for rank in range(3)]
    assert sum(problem is not None and "Bad CRC-32" in problem for problem in found) == 1
    file.write_bytes(whole[:-50])
    assert (
        damage_of_archive(StoragePath(file), 0, 1)
        == f"it has {len(whole) - 50} bytes, and is no archive of `torch.save`, or one that is cut off"
    )
    torch.save({"w": torch.rand(20)}, file, _use_new_zipfile_serialization=False)
    assert damage_of_archive(StoragePath(file), 0, 1) is None, "as torch wrote before 1.6: nothing to check it by"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 1}', '{"format": 1, "files": {"a": {}}}'])
def test_what_is_no_manifest(text: str) -> None:
    with pytest.raises(ltp.TPError, match="`here` is damaged: it is no manifest"):
        Manifest.from_json(text, "here")


def test_a_later_format() -> None:
    with pytest.raises(ltp.TPError, match="`here` has format 2, but this version of lightning_tp reads format 1"):
        Manifest.from_json('{"format": 2}', "here")
