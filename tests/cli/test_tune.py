"""`lightning-tp tune`: the configurations that fit, and progress."""

from __future__ import annotations

import json
import sys

import pytest

from lightning_tp.cli.main import main
from lightning_tp.cli.tune import Progress


def test_tune(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", config, "--gpus", "2", "--global-batch", "1", "--hardware", "t4", "--precision", "16-mixed,32-true"]) == 0
    text = capsys.readouterr().out
    assert "configurations fit on 2 devices" in text and "32-true" in text and "16-mixed" in text


@pytest.mark.slow
def test_tune_says_what_it_does_when_it_takes_long(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["tune", config, "--gpus", "2", "--global-batch", "2", "--json"]
    monkeypatch.setattr(Progress, "QUIET_S", 1e9)
    assert main(arguments) == 0 and not capsys.readouterr().err
    monkeypatch.setattr(Progress, "QUIET_S", 0.0)
    assert main(arguments) == 0
    found = capsys.readouterr()
    assert "tp=2 (2 of 2): bf16-mixed, checkpointing block" in found.err and json.loads(found.out)["fits"]


def test_the_fastest_few(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["tune", config, "--gpus", "2", "--global-batch", "2", "--seq", "32", "--json"]
    assert main([*arguments, "--top", "1"]) == 0
    assert len(json.loads(capsys.readouterr().out)["fits"]) == 1


def test_progress_is_quiet_at_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        progress("a")
        progress.start -= Progress.QUIET_S + 1
        progress("b")
    out, err = capsys.readouterr()
    assert not out and err.splitlines() == ["  4 s: b"]


def test_progress_is_one_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress() as progress:
        progress.start -= 100
        progress("a")
        progress("b")
    assert capsys.readouterr().err == "\r\033[K100 s: a\r\033[K100 s: b\r\033[K"
