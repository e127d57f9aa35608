"""torch's distributed checkpoint through this package: summed while it is written, and no value between the tensors is run."""

from __future__ import annotations

import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import lightning_tp as ltp
from lightning_tp.checkpoint.storage.dcp import FolderFiles, dcp_load, dcp_save
from lightning_tp.checkpoint.storage.path import StoragePath
from lightning_tp.core.comm.agree import Peers
from tests.checkpoint.runs import MyConfig

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # of `dcp.save` in one process


class MakesFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_all_of_torch_that_belongs_there_is_read(tmp_path: Path) -> None:
    state = {str(d): torch.ones(2, dtype=d) for d in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64)}
    state["channels_last"] = torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)
    dcp.save({**state, "n": (1, "a", None)}, checkpoint_id=tmp_path / "a", no_dist=True)
    into = {**{k: torch.zeros_like(v) for k, v in state.items()}, "n": None}
    dcp_load(into, StoragePath(tmp_path / "a"))
    assert all(torch.equal(into[k], v) for k, v in state.items()) and into["n"] == (1, "a", None)


def test_a_value_that_is_no_tensor_is_not_run(tmp_path: Path) -> None:
    """Unless its class is allowed, or the checkpoint is trusted."""
    dcp.save({"value": MakesFolder(tmp_path / "made")}, checkpoint_id=tmp_path / "a", no_dist=True)
    with pytest.raises(ltp.TPError, match=r"`value` in the checkpoint is not plain data"):
        dcp_load({"value": None}, StoragePath(tmp_path / "a"))
    assert not (tmp_path / "made").exists()
    dcp.save({"value": MyConfig(3)}, checkpoint_id=tmp_path / "b", no_dist=True)
    for options in ({"safe_globals": [MyConfig]}, {"weights_only": False}):
        state = {"value": None}
        dcp_load(state, StoragePath(tmp_path / "b"), **options)
        assert state["value"] == MyConfig(3)


def test_metadata_is_read_by_us(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path, no_dist=True)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(MakesFolder(tmp_path / "made")))
    with pytest.raises(ltp.TPError, match=r"posix\.mkdir"):
        dcp_load({"w": torch.zeros(3)}, StoragePath(tmp_path))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("url", ["{tmp}/a", "memory://dcp/a"])
def test_each_file_is_summed_while_it_is_written(url: str, tmp_path: Path) -> None:
    """On any file system, in a folder inside too; torch renames one of them afterwards."""
    folder = StoragePath(url.format(tmp=tmp_path))
    files = FolderFiles(folder)
    folder.make()
    dcp_save({"w": torch.rand(50)}, files, Peers())
    dcp_save({"more": torch.rand(5)}, files, Peers(), inside="inner")
    files.write("note", b"abc")
    names = {".metadata", "__0_0.distcp", "inner/.metadata", "inner/__0_0.distcp", "note"}
    assert set(files.entries) == names
    for name in names:
        content = (folder / name).read()
        assert files.entries[name] == {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}
    assert files.num_bytes == sum(entry["bytes"] for entry in files.entries.values()) and files.failed is None
    state = {"w": torch.zeros(50)}
    dcp_load(state, folder)
    assert state["w"].abs().sum() > 0


def test_why_a_file_could_not_be_written_is_remembered(tmp_path: Path) -> None:
    class Full:
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

    files = FolderFiles(StoragePath(tmp_path))
    with pytest.raises(RuntimeError), files.create_stream(tmp_path / "a", "wb") as stream:
        stream.raw = Full()
        try:
            stream.write(b"abc")
        except OSError:
            raise RuntimeError("torch's writer says something else") from None
    assert files.failed is not None and files.failed.errno == 28 and files.entries == {}
