"""The manifest: what it says, and that something else is not taken for one."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
import torch

import lightning_tp as ltp
from lightning_tp.checkpoint import StoragePath
from lightning_tp.checkpoint.manifest import Manifest, checksum, damage_of_file, read
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


def test_sha256_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    said = {"bytes": 3, "sha256": checksum(StoragePath(tmp_path / "a"), "sha256")}
    assert damage_of_file(StoragePath(tmp_path), "a", said) is None
    (tmp_path / "a").write_bytes(b"abd")
    assert "sha256" in damage_of_file(StoragePath(tmp_path), "a", said)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 1}', '{"format": 1, "files": {"a": {}}}'])
def test_what_is_no_manifest(text: str) -> None:
    with pytest.raises(ltp.TPError, match="`here` is damaged: it is no manifest"):
        Manifest.from_json(text, "here")


def test_a_later_format() -> None:
    with pytest.raises(ltp.TPError, match="`here` has the format 2, and this version of lightning_tp reads 1"):
        Manifest.from_json('{"format": 2}', "here")
