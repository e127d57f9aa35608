"""One file of a folder, as a Trainer without this package wants it (resuming from it: `test_resume.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

import lightning_tp as ltp
from lightning_tp.testing import run_ranks
from tests.checkpoint.runs import Net, data, flip, trainer


def test_as_if_it_had_been_saved_in_one_file(tmp_path: Path) -> None:
    def body() -> None:
        for whole in (False, True):
            torch.manual_seed(0)
            run = trainer(
                EMAWeightAveraging(decay=0.5), strategy=dict(save_distributed_checkpoint=not whole), enable_checkpointing=False
            )
            run.fit(Net(), data())
            run.save_checkpoint(tmp_path / f"{whole}.ckpt")

    run_ranks(body, 2, init=False)
    ltp.consolidate(tmp_path / "False.ckpt", tmp_path / "new" / "one.ckpt")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["one.ckpt"]
    got, ref = (torch.load(p, weights_only=True) for p in (tmp_path / "new" / "one.ckpt", tmp_path / "True.ckpt"))
    names = [n for n in ref["state_dict"]]
    for of in ref["optimizer_states"]:  # by name there, by number here: both are in the order of the parameters
        order = [n for g in of["param_groups"] for n in g["params"]]
        of["state"] = {order.index(n): v for n, v in of["state"].items()}
        of["param_groups"] = [{**g, "params": [order.index(n) for n in g["params"]]} for g in of["param_groups"]]
    assert set(got["state_dict"]) == set(names)
    same(got, ref, "")


def same(got: Any, ref: Any, where: str) -> None:
    if isinstance(ref, dict):
        assert set(got) == set(ref), where
        for k in ref:
            same(got[k], ref[k], f"{where}/{k}")
    elif isinstance(ref, (list, tuple)):
        assert len(got) == len(ref), where
        for i, (a, b) in enumerate(zip(got, ref)):
            same(a, b, f"{where}/{i}")
    elif isinstance(ref, torch.Tensor):
        assert torch.equal(got, ref), where
    else:
        assert got == ref, where


def test_what_it_refuses(tmp_path: Path) -> None:
    def body() -> None:
        run = trainer(max_epochs=1)
        run.fit(Net(), data())
        run.save_checkpoint(tmp_path / "a.ckpt")

    run_ranks(body, 1, init=False)
    with pytest.raises(ltp.TPError, match="is no checkpoint: there is no such file"):
        ltp.consolidate(tmp_path / "nothing", tmp_path / "one.ckpt")
    flip(tmp_path / "a.ckpt" / "__0_0.distcp")
    with pytest.raises(ltp.TPError, match=r"`__0_0\.distcp` has checksum"):
        ltp.consolidate(tmp_path / "a.ckpt", tmp_path / "one.ckpt")
    assert not (tmp_path / "one.ckpt").exists()
