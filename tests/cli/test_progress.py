"""Progress is quiet at first, and leaves nothing on a terminal."""

from __future__ import annotations

import sys

import pytest

from lightning_tp.cli.progress import Progress


def test_quiet_at_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        progress("a")
        progress.start -= Progress.QUIET_S + 1
        progress("b")
    out, err = capsys.readouterr()
    assert not out and err.splitlines() == ["  4 s: b"]


def test_one_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress() as progress:
        progress.start -= 100
        progress("a")
        progress("b")
    assert capsys.readouterr().err == "\r\033[K100 s: a\r\033[K100 s: b\r\033[K"
