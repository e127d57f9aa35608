"""Nothing that a checkpoint says is run: not by `meta.pt`, not by `.metadata`, not by a value between the tensors."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import lightning_tp as ltp
from lightning_tp import errors
from lightning_tp.checkpoint import Peers, SaveContent, StoragePath, commit, dcp_load, load, read_metadata, save_folder
from lightning_tp.testing import run_ranks
from tests.checkpoint.runs import Net, data, trainer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # of `dcp.save` in one process


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@dataclass
class MyConfig:
    width: int = 16


def test_a_malicious_folder(tmp_path: Path) -> None:
    made = tmp_path / "made"
    folder = StoragePath(tmp_path / "a.ckpt")
    save_folder(folder, SaveContent({"w": torch.ones(3), "value": 1}, rest=commit.to_bytes({})), Peers())
    good = (folder / ".metadata").read()

    (tmp_path / "a.ckpt" / ".metadata").write_bytes(pickle.dumps(Evil(made)))
    with pytest.raises(ltp.TPError, match=r"\.metadata` would make an object of `posix\.mkdir`.*nothing of it was read"):
        read_metadata(folder)
    with pytest.raises(ltp.TPError, match=r"posix\.mkdir"):
        dcp_load({"w": torch.zeros(3)}, folder)
    (tmp_path / "a.ckpt" / ".metadata").write_bytes(good[:50])
    with pytest.raises(ltp.TPError, match=r"\.metadata` is damaged"):
        read_metadata(folder)

    torch.save({"a": Evil(made)}, tmp_path / "meta.pt")
    with pytest.raises(ltp.TPError, match=r"meta\.pt` has objects of `(posix|nt)\.mkdir`"):
        load(StoragePath(tmp_path / "meta.pt"))
    assert not made.exists()

    dcp.save({"value": Evil(made)}, checkpoint_id=tmp_path / "b", no_dist=True)
    with pytest.raises(ltp.TPError, match=r"`value` of the checkpoint is no plain data"):
        dcp_load({"value": None}, StoragePath(tmp_path / "b"))
    assert not made.exists()
    load(StoragePath(tmp_path / "meta.pt"), weights_only=False)  # who asks for it, gets it
    assert made.exists()


def test_all_of_torch_that_belongs_there_is_read(tmp_path: Path) -> None:
    state = {str(d): torch.ones(2, dtype=d) for d in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64)}
    state["channels_last"] = torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)
    dcp.save({**state, "n": (1, "a", None)}, checkpoint_id=tmp_path / "a", no_dist=True)
    into = {**{k: torch.zeros_like(v) for k, v in state.items()}, "n": None}
    dcp_load(into, StoragePath(tmp_path / "a"))
    assert all(torch.equal(into[k], v) for k, v in state.items()) and into["n"] == (1, "a", None)


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
