"""Nothing that a pickle of a checkpoint says is run: not by `meta.pt`, not by `.metadata`. Values between the tensors: `test_dcp.py`."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import lightning_tp as ltp
from lightning_tp import errors
from lightning_tp.checkpoint.storage.path import StoragePath
from lightning_tp.checkpoint.storage.unpickle import load, read_metadata
from lightning_tp.checkpoint.weights.open import open_checkpoint
from lightning_tp.testing import run_ranks
from tests.checkpoint.runs import MyConfig, Net, data, trainer


class MakesFolder:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_malicious_file(tmp_path: Path) -> None:
    """Also through a file system that is not this machine's; who asks for it, gets it."""
    file = tmp_path / "meta.pt"
    torch.save({"a": MakesFolder(tmp_path / "made")}, file)
    stored = StoragePath("memory://meta.pt")
    with stored.open("wb") as stream:
        stream.write(file.read_bytes())
    for path in (StoragePath(file), stored):
        with pytest.raises(ltp.TPError, match=r"meta\.pt` contains objects of `(posix|nt)\.mkdir`"):
            load(path)
    assert not (tmp_path / "made").exists()
    load(StoragePath(file), weights_only=False)
    assert (tmp_path / "made").exists()


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    with pytest.raises(ltp.TPError, match=r"a\.ckpt` can't be read: No such file or directory"):
        load(StoragePath(file))
    torch.save({"w": torch.ones(1000)}, file)
    whole = file.read_bytes()
    for content in (b"", b"hello", whole[:-100], whole[:1000]):
        file.write_bytes(content)
        for mmap in (False, True):
            with pytest.raises(ltp.TPError, match=r"a\.ckpt` is no checkpoint that `torch\.load` can read"):
                load(StoragePath(file), mmap=mmap)


def test_mapped_tensors_are_those_of_the_file(tmp_path: Path) -> None:
    """In the format that torch writes since 1.6; an older one is read into memory."""
    tensors = {"w": torch.rand(5), "n": 3}
    torch.save(tensors, tmp_path / "new")
    torch.save(tensors, tmp_path / "old", _use_new_zipfile_serialization=False)
    for name in ("new", "old"):
        got = load(StoragePath(tmp_path / name), mmap=True)
        assert torch.equal(got["w"], tensors["w"]) and got["n"] == 3


@pytest.mark.parametrize(
    "what",
    [MakesFolder(Path("/tmp/should-not-be-there")), eval, {"a": os.system}, torch.nn.Linear, torch.load, Counter, torch.compile],
    ids=["call", "builtin", "function", "class", "beside _get_layout", "beside OrderedDict", "beside Size"],
)
def test_metadata_names_nothing_else(what: Any, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(what))
    with pytest.raises(
        ltp.TPError, match=r"\.metadata` would create an object of `.*has no place in the metadata.*nothing of it was loaded"
    ):
        read_metadata(StoragePath(tmp_path))
    with pytest.raises(ltp.TPError, match="no place"):
        open_checkpoint(tmp_path)
    assert not Path("/tmp/should-not-be-there").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_metadata_that_is_damaged(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(3), "value": 1}, checkpoint_id=tmp_path, no_dist=True)
    good = (tmp_path / ".metadata").read_bytes()
    assert set(read_metadata(StoragePath(tmp_path)).state_dict_metadata) == {"w", "value"}
    for content in (good[:50], b"", pickle.dumps({"w": 1})):
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(ltp.TPError, match=r"\.metadata` is damaged"):
            read_metadata(StoragePath(tmp_path))


def test_hyperparameters_of_a_class_of_the_users(tmp_path: Path) -> None:
    def body() -> None:
        errors.HEAD_START = 0.0
        path = tmp_path / "a.ckpt"
        first = trainer(max_epochs=1)
        first.fit(Net(config=MyConfig()), data())
        first.save_checkpoint(path)
        with pytest.raises((ltp.TPError, SystemExit)) as info:
            trainer().fit(Net(), data(), ckpt_path=path)
        if dist.get_rank() == 0:
            assert "MyConfig`" in str(info.value) and "TPStrategy(safe_globals=[MyConfig])" in str(info.value)
            assert "weights_only=False" in str(info.value)
        for options in (dict(strategy=dict(safe_globals=[MyConfig])), dict(weights_only=False)):
            module = Net(seed=1)
            again = trainer(strategy=options.get("strategy"))
            again.fit(module, data(), ckpt_path=path, weights_only=options.get("weights_only"))
            assert again.global_step == 4

    run_ranks(body, 2, init=False)
