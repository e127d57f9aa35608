"""What is wrapped of torch for files of checkpoints, and of the operating system, on this version."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_tp import _compat


def test_two_names_change_places(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("a")
    b.mkdir()
    if _compat.rename_exchange(str(a), str(b)):
        assert a.is_dir() and b.read_text() == "a"
    with pytest.raises(FileNotFoundError):
        if not _compat.rename_exchange(str(a), str(tmp_path / "missing")):
            raise FileNotFoundError


def test_classes_in_the_metadata_of_a_checkpoint() -> None:
    import importlib
    import sys

    for module, names in _compat.METADATA_CLASSES.items():
        if module == "pathlib._local" and sys.version_info < (3, 13):
            continue
        assert all(hasattr(importlib.import_module(module), name) for name in names), module
