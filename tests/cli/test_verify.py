"""`lightning-tp verify`: the report, and the exit status."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import lightning_tp as ltp
from lightning_tp.cli.main import main


def test_verify(targets: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", targets("llama"), "--tp", "2", "--dp", "2", "--steps", "2"]) == 0
    assert re.search(r"^Matches a single process: .* \(tp=2 x dp=2, 2 SGD steps", capsys.readouterr().out, re.M)
    assert main(["verify", targets("with_loss")]) == 0
    assert "Plan (inferred" in capsys.readouterr().out


def test_verify_fails(targets: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_tp.shards.gradients import PartialGradients

    watch = PartialGradients.watch
    monkeypatch.setattr(
        PartialGradients, "watch", lambda self, ps: watch(self, [p for p in ps if p._tp_shard.name != "norm.weight"])
    )
    assert main(["verify", targets("llama")]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("DIFFERS from a single process"))
    assert "`norm.weight`" in lines[at] and lines[at + 2].split()[0] == "BAD" and "norm.weight" in lines[at + 2]


def test_a_model_that_does_not_run_split(targets: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan that fits the sizes, and not the code: the sizes of a fused projection in it are whole."""
    plan = tmp_path / "plan.json"
    plan.write_text(ltp.Plan({"qkv": {"style": "fused_colwise", "parts": 3}, "out": "rowwise"}).to_json())
    assert main(["verify", targets("fused"), "--plan", str(plan)]) == 1
    assert "the sharded model does not run" in capsys.readouterr().err
