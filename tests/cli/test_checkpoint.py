"""`lightning-tp export | consolidate | inspect`: from the command line to the functions, and back to the exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_tp.cli.main import main


@pytest.fixture
def file(tmp_path: Path) -> str:
    torch.save({"state_dict": {"weight": torch.ones(4, 8)}, "pytorch-lightning_version": "2.6.0"}, tmp_path / "one.ckpt")
    return str(tmp_path / "one.ckpt")


def test_export_names_the_file_and_its_size(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["export", file, str(out), "--dtype", "bf16"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"Wrote {out}: 1 file, ") and text.endswith(" bytes\n")
    assert main(["export", file, str(out)]) == 2  # it is there
    assert "overwrite" in capsys.readouterr().err
    assert main(["export", file, str(out), "--overwrite"]) == 0


def test_inspect_as_json(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", file, "--json"]) == 0
    assert "weight" in json.dumps(json.loads(capsys.readouterr().out))


def test_an_incomplete_checkpoint_has_status_1(
    file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_tp.checkpoint import inspect

    found = inspect.inspect_checkpoint(file)
    monkeypatch.setattr(type(found), "complete", False, raising=False)
    monkeypatch.setattr(inspect, "inspect_checkpoint", lambda *args, **kwargs: found)
    assert main(["inspect", file]) == 1


def test_consolidate_refuses_what_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["consolidate", str(tmp_path / "none"), str(tmp_path / "one.ckpt")]) == 2
    assert capsys.readouterr().err.startswith("lightning-tp: ")
