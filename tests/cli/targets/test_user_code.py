"""The user's code: its errors in one line, and the modules that it leaves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_tp import TPError
from lightning_tp.cli.targets.user_code import call_user_code, import_user_module


def test_an_error_names_the_line_of_the_user() -> None:
    def fails() -> None:
        raise KeyError("x")  # this line

    line = fails.__code__.co_firstlineno + 1
    with pytest.raises(TPError, match=rf"`t`: KeyError: 'x' \(.*test_user_code\.py, line {line}\)"):
        call_user_code(fails, "t")
    with pytest.raises(TPError, match=r"sys\.exit\(3\)"):
        call_user_code(lambda: sys.exit(3), "t")
    own = TPError("as it is")
    with pytest.raises(TPError) as info:
        call_user_code(lambda: (_ for _ in ()).throw(own), "t")
    assert info.value is own
    assert call_user_code(lambda: 5, "t") == 5


def test_a_file_that_fails_leaves_no_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    file = tmp_path / "half_a_module.py"
    file.write_text("value = 1 / 0")
    with pytest.raises(TPError, match="ZeroDivisionError"):
        import_user_module(str(file), "t")
    assert "half_a_module" not in sys.modules
    file.write_text("value = 3")
    assert import_user_module(str(file), "t").value == 3
    before = sys.modules["half_a_module"]
    file.write_text("raise ValueError")
    with pytest.raises(TPError):
        import_user_module(str(file), "t")
    assert sys.modules.pop("half_a_module") is before
    with pytest.raises(TPError, match=r"there is no file nowhere\.py"):
        import_user_module("nowhere.py", "t")
