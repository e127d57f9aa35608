"""What a checkpoint is, said before anything is read; and every way of being incomplete."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_tp as ltp
from lightning_tp.checkpoint.weights.inspect import inspect_checkpoint
from lightning_tp.cli.main import main
from lightning_tp.testing import run_ranks
from tests.checkpoint.lit import train


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    path = tmp_path_factory.mktemp("saved") / "a.ckpt"
    return path, run_ranks(train, 4, 2, 4, 2, save=path, init=False)[0]


def with_manifest(source: Path, to: Path, checksum: str = "sha256") -> Path:
    shutil.copytree(source, to)
    (to / "manifest.json").unlink(missing_ok=True)
    files: dict[str, Any] = {}
    for file in sorted(to.iterdir()):
        data = file.read_bytes()
        files[file.name] = {
            "bytes": len(data),
            checksum: hashlib.sha256(data).hexdigest() if checksum == "sha256" else f"{zlib.crc32(data):08x}",
        }
    mesh = {"data_parallel": 2, "tensor_parallel": 2}
    manifest = {
        "format": 1,
        "step": 2,
        "epoch": 0,
        "mesh": mesh,
        "versions": {"torch": "2.13"},
        "weights_only": False,
        "files": files,
    }
    (to / "manifest.json").write_text(json.dumps(manifest))
    return to


def test_a_folder(saved: tuple[Path, dict[str, Tensor]], capsys: pytest.CaptureFixture[str]) -> None:
    path, weights = saved
    assert main(["inspect", str(path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["complete"] and said["step"] == 2 and said["mesh"] == {"data_parallel": 2, "tensor_parallel": 2}
    assert said["parameters"] == sum(t.numel() for t in weights.values())
    assert said["bytes_by_dtype"] == {"float32": sum(t.nbytes for t in weights.values())} and said["weights_only"] is False
    steps = len(weights)  # a count of steps for each
    assert said["optimizers"] == [2 * said["bytes_by_dtype"]["float32"] + 4 * steps] and ".metadata" in said["files"]
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    for part in (
        "a folder that many ranks have written, by lightning_tp",
        "step 2",
        "data_parallel 2 x tensor_parallel 2",
        "user-provided",
        "complete      yes",
    ):
        assert part in out


@pytest.mark.parametrize("checksum", ["sha256", "crc32"])
def test_against_the_manifest(
    checksum: str, saved: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = with_manifest(saved[0], tmp_path / "a.ckpt", checksum)
    assert main(["inspect", str(path), "--verify"]) == 0
    assert "yes (sizes and checksums as in its manifest)" in capsys.readouterr().out
    shard = sorted(path.glob("*.distcp"))[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert main(["inspect", str(path)]) == 0  # as long as it should be
    assert main(["inspect", str(path), "--verify"]) == 1
    assert f"NO: {shard.name} is not as it was written" in capsys.readouterr().out
    shard.write_bytes(data[:-1])
    assert main(["inspect", str(path)]) == 1
    assert f"{shard.name} has {len(data) - 1} bytes, and should have {len(data)}" in capsys.readouterr().out
    shard.unlink()
    assert main(["inspect", str(path)]) == 1
    assert f"{shard.name} is missing" in capsys.readouterr().out
    (path / "manifest.json").write_text("{")
    assert main(["inspect", str(path)]) == 1
    assert "manifest.json can't be read" in capsys.readouterr().out


def test_without_a_manifest(saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    shutil.copytree(saved[0], path)
    (path / "manifest.json").unlink(missing_ok=True)
    assert inspect_checkpoint(path).complete and "without a manifest" in str(inspect_checkpoint(path))
    shard = sorted(path.glob("*.distcp"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:1000])
    assert inspect_checkpoint(path).problems == [f"{shard.name} has 1000 bytes, and should have {len(whole)}"]
    shard.write_bytes(b"\0" * len(whole))
    assert inspect_checkpoint(path).complete
    assert "the file is broken" in inspect_checkpoint(path, verify=True).problems[0]
    (path / ".metadata").unlink()
    assert "its save did not come to its end" in inspect_checkpoint(path).problems[0]


def test_other_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = torch.nn.Linear(3, 4)
    torch.save(
        {"state_dict": layer.state_dict(), "epoch": 1, "global_step": 7, "pytorch-lightning_version": "2.6.6"}, tmp_path / "a.ckpt"
    )
    found = inspect_checkpoint(tmp_path / "a.ckpt")
    assert (found.step, found.epoch, found.parameters, found.weights_only, found.complete) == (7, 1, 16, True, True)
    assert "one file, by a Lightning Trainer" in str(found) and found.versions == {"lightning": "2.6.6"}
    ltp.export(tmp_path / "a.ckpt", tmp_path / "st", max_shard_size=40)
    assert inspect_checkpoint(tmp_path / "st").parameters == 16
    (tmp_path / "st" / "model-00001-of-00002.safetensors").unlink()
    assert main(["inspect", str(tmp_path / "st")]) == 1
    assert "is not there, and the folder's index names it" in capsys.readouterr().out
    (tmp_path / "a.ckpt").write_bytes((tmp_path / "a.ckpt").read_bytes()[:-100])
    assert main(["inspect", str(tmp_path / "a.ckpt")]) == 1
    (tmp_path / "none").mkdir()
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert "it is empty" in capsys.readouterr().err
