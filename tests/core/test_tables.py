"""Tables as text: the same with and without rich."""

from __future__ import annotations

import sys

import pytest

from lightning_tp.core.tables import table

HEADER = ["name", "shape", "bytes"]
ROWS = [["q", "[4, 8]", "1,024"], ["a.longer.name", "", "8"]]
LEFT = ["  name           shape   bytes", "  q              [4, 8]  1,024", "  a.longer.name          8"]
RIGHT = ["name           shape   bytes", "q              [4, 8]  1,024", "a.longer.name              8"]


@pytest.mark.parametrize("rich", [True, False], ids=["rich", "without rich"])
def test_columns_are_aligned(rich: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    assert table(HEADER, ROWS).split("\n") == LEFT
    assert table(HEADER, ROWS, right={2}, indent=0).split("\n") == RIGHT
    assert table(HEADER, []).split("\n") == ["  name  shape  bytes"]
    assert "x" * 500 in table(["long"], [["x" * 500]])  # no cell is cut or wrapped
