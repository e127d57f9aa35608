"""Checkpoints of all kinds are opened, each by its own reader; what is none is described."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import lightning_tp as ltp
from lightning_tp.checkpoint.weights.open import open_checkpoint


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_each_kind_has_its_reader(tmp_path: Path) -> None:
    weights = {"w": torch.rand(3, 2)}
    dcp.save({"state_dict": weights}, checkpoint_id=tmp_path / "folder", no_dist=True)
    save_file(weights, tmp_path / "a.safetensors")
    torch.save({"state_dict": weights}, tmp_path / "file")
    for name, kind, by in (
        ("folder", "folder", "Lightning's ModelParallelStrategy"),
        ("a.safetensors", "safetensors", "safetensors"),
        ("file", "file", "torch.save"),
    ):
        contents = open_checkpoint(tmp_path / name)
        assert (contents.kind, contents.by, contents.path) == (kind, by, tmp_path / name)
        assert torch.equal(contents.model["w"].read(), weights["w"])


def test_what_is_none_is_described(tmp_path: Path) -> None:
    for make, text in (
        (lambda: None, "there is no such file or folder"),
        (lambda: (tmp_path / "x").mkdir(), "it is empty"),
        (lambda: (tmp_path / "x" / "notes").write_text(""), r"a folder without `\.metadata`.*; it has notes"),
        (lambda: (tmp_path / "x" / "a.ckpt").write_text(""), "the folder contains a.ckpt. Name one of these"),
        (lambda: (tmp_path / "x" / "__0_0.distcp").write_text(""), r"it has shards but no `\.metadata`.*save was never completed"),
    ):
        make()
        with pytest.raises(ltp.TPError, match=text):
            open_checkpoint(tmp_path / "x")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ltp.TPError, match=r"no checkpoint that `torch\.load` can read"):
        open_checkpoint(tmp_path / "text")
    with pytest.raises(ltp.TPError, match=r"there is no such file or folder\. Beside it: text, x\."):
        open_checkpoint(tmp_path / "none")
