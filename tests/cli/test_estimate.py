"""`lightning-tp estimate`: tables and JSON."""

from __future__ import annotations

import json
import sys

import pytest

from lightning_tp.cli.main import main


def test_estimate(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", config, "--tp", "2", "--dp", "256", "--seq", "128", "--batch", "3", "--hardware", "a100"]) == 0
    text = capsys.readouterr().out
    assert "512 x NVIDIA A100" in text and "tokens/s" in text and "Assumed" in text
    assert main(["estimate", config, "--tp", "2", "--seq", "64", "--json", "--activation-checkpointing", "block"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["tp"] == 2 and values["activation_checkpointing"] == "block" and values["tokens"] == 128


def test_frames_on_a_terminal(config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["estimate", config, "--tp", "2", "--seq", "64"]) == 0
    out = capsys.readouterr().out
    assert "\u2502" in out and "Assumed:" in out and "NVIDIA H100" in out
