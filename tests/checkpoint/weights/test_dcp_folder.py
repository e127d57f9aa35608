"""Folders of distributed checkpoint: what they hold is found and read, slice by slice, and what is broken is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

import lightning_tp as ltp
from lightning_tp.checkpoint.storage.path import StoragePath
from lightning_tp.checkpoint.storage.unpickle import read_metadata
from lightning_tp.checkpoint.weights.dcp_folder import DcpFolder, model_key, open_folder
from lightning_tp.checkpoint.weights.open import open_checkpoint
from lightning_tp.checkpoint.weights.stored import StoredTensor
from lightning_tp.core.boxes import Box
from lightning_tp.testing import run_ranks
from tests.checkpoint.lit import train


def read(tensors: dict[str, StoredTensor]) -> dict[str, Tensor]:
    return {name: s.read() for name, s in tensors.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A folder of 2 x 2 ranks, and what it should hold."""
    path = tmp_path_factory.mktemp("saved") / "a.ckpt"
    return path, run_ranks(train, 4, 2, 4, 2, save=path, init=False)[0]


def test_a_folder_of_a_mesh(saved: tuple[Path, dict[str, Tensor]]) -> None:
    """FSDP2's uneven rows, a shared key/value head, an uneven width: whole, bitwise, and any box of it."""
    path, weights = saved
    contents = open_checkpoint(path)
    got = read(contents.model)
    assert set(got) == set(weights) and contents.kind == "folder" and contents.by == "lightning_tp"
    assert all(torch.equal(got[n], w) for n, w in weights.items())
    name = "model.layers.0.feed_forward.w1.weight"
    stored, whole = contents.model[name], weights[name]
    assert torch.equal(stored.read(Box((40, 3), (11, 5))), whole[40:51, 3:8])
    assert stored.cast(torch.bfloat16).read().dtype == torch.bfloat16
    (state,) = contents.optimizers
    assert state["param_groups"][0]["params"][0] == "model.tok_embeddings.weight" and state["param_groups"][0]["lr"] == 1e-2
    assert state["state"][name]["exp_avg"].shape == tuple(whole.shape) and state["state"][name]["step"].read() == 2
    assert contents.rest["global_step"] == 2 and contents.rest["hyper_parameters"]["seed"] == 0


def test_metadata_is_as_torch_reads_it(saved: tuple[Path, dict[str, Tensor]]) -> None:
    theirs = dcp.FileSystemReader(saved[0]).read_metadata()
    mine = read_metadata(StoragePath(saved[0]))
    assert mine.state_dict_metadata == theirs.state_dict_metadata and mine.storage_data == theirs.storage_data
    assert mine.planner_data == theirs.planner_data


def test_what_is_broken_is_named(saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"

    def again() -> Path:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(saved[0], path)
        return path

    shards = sorted(f.name for f in again().glob("*.distcp"))
    (path / shards[1]).unlink()
    with pytest.raises(ltp.TPError, match=rf"lacks the file {shards[1]}, which has `.*`. The checkpoint is not complete"):
        read(open_checkpoint(path).model)
    (again() / shards[1]).write_bytes((path / shards[1]).read_bytes()[:3000])
    with pytest.raises(ltp.TPError, match=rf"{shards[1]}` can't be read at `.*`: the file is broken or cut off"):
        read(open_checkpoint(path).model)
    (again() / ".metadata").write_bytes((path / ".metadata").read_bytes()[:500])
    with pytest.raises(ltp.TPError, match=r"\.metadata` is damaged"):
        open_checkpoint(path)
    (again() / ".metadata").unlink()
    with pytest.raises(ltp.TPError, match=r"shards but no `\.metadata`, which is written last: its save was never completed"):
        open_checkpoint(path)
    (again() / "meta.pt").write_bytes(b"nonsense")
    with pytest.raises(ltp.TPError, match=r"meta\.pt` is no checkpoint that `torch\.load` can read"):
        open_checkpoint(path)


def test_what_is_compressed_or_outside_is_refused(saved: tuple[Path, dict[str, Tensor]]) -> None:
    folder = DcpFolder(saved[0])
    key = "state_dict.model.norm.weight"
    info = next(info for (name, _), info in folder._pieces.items() if name == key)
    for field, value, says in (
        ("transform_descriptors", ["zstd"], r"is compressed \(zstd\)"),
        ("relative_path", "../a.distcp", r"is outside of the folder, in \.\./a\.distcp"),
    ):
        before = getattr(info, field)
        setattr(info, field, value)
        with pytest.raises(ltp.TPError, match=says):
            folder.value(key).read()
        setattr(info, field, before)
    folder._pieces.clear()
    with pytest.raises(ltp.TPError, match=rf"`\.metadata` does not say where `{key}` is"):
        folder.value(key).read()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_nested_state_is_as_it_was_saved(tmp_path: Path) -> None:
    """Lists and numbers as keys, values that are no tensors, and tensors of callbacks in a folder of their own."""
    state = {"state": {"w": {"step": torch.tensor(3.0), "of": [torch.ones(2), 5]}}, "param_groups": [{"lr": 0.1, "params": ["w"]}]}
    second = {"state": {}, "param_groups": [{"lr": 0.2, "params": []}]}
    dcp.save({"model": {"w": torch.ones(2, 2)}, "optimizer_10": second, "optimizer_2": state}, checkpoint_id=tmp_path, no_dist=True)
    dcp.save({"mine/ema": torch.full((2,), 7.0)}, checkpoint_id=tmp_path / "lightning_tp_sharded", no_dist=True)
    torch.save({"mine": [{"lightning_tp_sharded": "mine/ema", "name": "ema"}], "loops": {}}, tmp_path / "meta.pt")
    contents = open_folder(tmp_path)
    first, last = contents.optimizers
    assert first["param_groups"] == [{"lr": 0.1, "params": ["w"]}] and last["param_groups"][0]["lr"] == 0.2
    assert first["state"]["w"]["step"].read() == 3 and first["state"]["w"]["of"][0].read().tolist() == [1, 1]
    assert first["state"]["w"]["of"][1] == 5
    assert contents.rest["mine"][0].read().tolist() == [7, 7] and contents.by == "Lightning's FSDPStrategy"


@pytest.mark.parametrize(
    ("names", "key"), [(["state_dict.a", "model.b"], "state_dict"), (["model.b", "x"], "model"), (["models.a", "x"], None)]
)
def test_the_models_name(names: list[str], key: str | None) -> None:
    assert model_key(names) == key


def test_files_that_are_missing_or_short(saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    shutil.copytree(saved[0], path)
    assert DcpFolder(path).missing() == []
    shards = sorted(path.glob("*.distcp"))
    size = shards[0].stat().st_size
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    shards[1].unlink()
    assert DcpFolder(path).missing() == [
        f"`{shards[0].name}` has {size - 1} bytes, but should have {size}",
        f"`{shards[1].name}` is missing",
    ]
