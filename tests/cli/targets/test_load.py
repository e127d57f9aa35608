"""What a TARGET is taken for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_tp import TPError
from lightning_tp.cli.targets import load as module
from lightning_tp.cli.targets.load import load


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    calls: list[tuple[str, str]] = []
    for name in ("load_config", "load_script", "load_function"):
        monkeypatch.setattr(module, name, lambda text, name=name, **options: calls.append((name, str(text))))
    return calls


@pytest.mark.parametrize(
    ("text", "loader"),
    [
        ("package.module:build", "load_function"),
        ("file.py:build", "load_function"),
        ("train.py", "load_script"),
        ("train.py fit --config a:b.yaml", "load_script"),
        ("'my folder/train.py' --x 3", "load_script"),
        ("model/config.json", "load_config"),
        ("nowhere.json", "load_config"),
    ],
)
def test_by_its_form(text: str, loader: str, taken: list[Any]) -> None:
    load(text)
    assert taken == [(loader, text)]


def test_a_folder(tmp_path: Path, taken: list[Any]) -> None:
    with pytest.raises(TPError, match=r"the folder has no config\.json"):
        load(str(tmp_path))
    (tmp_path / "config.json").touch()
    load(str(tmp_path))
    assert taken == [("load_config", str(tmp_path / "config.json"))]


@pytest.mark.parametrize(
    ("text", "words"), [("file.py:", "such as file.py:build"), ("llama", "a TARGET is"), (":f", "a TARGET is")]
)
def test_mistakes(text: str, words: str, taken: list[Any]) -> None:
    with pytest.raises(TPError, match=words):
        load(text)
    assert not taken
