"""The plan that a module has as an attribute; the user's code: its errors in one line, and the modules that it leaves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

from lightning_tp import Plan, TPError
from lightning_tp.cli.targets.target import call_user_code, import_user_module, plan_of_module


@pytest.mark.parametrize("plan", [Plan({"*": "replicate"}), {"*": "replicate"}, "plan.json", Path("plan.json")])
def test_what_can_be_a_plan(plan: object) -> None:
    model = nn.Linear(2, 2)
    assert plan_of_module(model) is None
    model.plan = plan  # type: ignore[assignment]
    assert plan_of_module(model) is plan


def test_another_attribute_of_that_name() -> None:
    model = nn.Linear(2, 2)
    model.plan = nn.Linear(1, 1)
    assert plan_of_module(model) is None


def test_an_error_names_the_line_of_the_user() -> None:
    def fails() -> None:
        raise KeyError("x")  # this line

    line = fails.__code__.co_firstlineno + 1
    with pytest.raises(TPError, match=rf"`t`: KeyError: 'x' \(.*test_target\.py, line {line}\)"):
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


def test_folders_of_the_user_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my_lightning_tp_runs" / "importlib_of_mine"
    folder.mkdir(parents=True)
    (folder / "fails.py").write_text("x = 1\nraise ValueError('here')\n")
    with pytest.raises(TPError, match=rf"ValueError: here \({folder / 'fails.py'}, line 2\)"):
        import_user_module(str(folder / "fails.py"), "fails.py:build")
