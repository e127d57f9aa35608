"""What is wrapped of torch for files of checkpoints, on this version."""

from __future__ import annotations

from lightning_tp import _compat


def test_classes_in_the_metadata_of_a_checkpoint() -> None:
    import importlib
    import sys

    for module, names in _compat.METADATA_CLASSES.items():
        if module == "pathlib._local" and sys.version_info < (3, 13):
            continue
        assert all(hasattr(importlib.import_module(module), name) for name in names), module
