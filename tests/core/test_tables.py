from __future__ import annotations

import sys

import pytest

from lightning_tp.core import tables
from lightning_tp.core.tables import has_rich_terminal, print_colored, print_framed, table

HEADER = ["rule", "bytes", "reason"]
ROWS = [["layers.[0]", "1,024", "[red]not markup[/red] :smile:"], ["norm", "8", ""]]
TEXT = """\
  rule        bytes  reason
  layers.[0]  1,024  [red]not markup[/red] :smile:
  norm            8"""


def test_columns_line_up() -> None:
    assert table(HEADER, ROWS, right={1}) == TEXT
    assert table(HEADER, ROWS, right={1}, indent=0) == "\n".join(line[2:] for line in TEXT.splitlines())


def test_without_rich_the_text_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert table(HEADER, ROWS, right={1}) == TEXT


def test_a_long_cell_is_not_wrapped() -> None:
    assert table(["reason"], [["x " * 2000 + "end"]]).splitlines()[1] == "  " + "x " * 2000 + "end"


def test_a_header_alone() -> None:
    assert table(["a", "b"], []) == "  a  b" == "  " + tables._padded([["a", "b"]], ())


def test_frames_need_a_terminal_and_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_rich_terminal()  # pytest captures stdout
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert has_rich_terminal()
    monkeypatch.setattr(tables, "find_spec", lambda name: None)
    assert not has_rich_terminal()


def test_a_framed_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "100")
    styled = []
    print_framed("Title [1]", HEADER, ROWS, right={1}, style=lambda column, cell: styled.append((column, cell)) or "")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "Title [1]" and "\u2502 norm       \u2502     8 \u2502" in lines[5]
    assert styled[:2] == [(0, "layers.[0]"), (1, "1,024")] and len(styled) == 6
    print_colored("Assumed: [x]", "dim")
    assert capsys.readouterr().out == "Assumed: [x]\n"
