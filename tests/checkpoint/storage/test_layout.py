"""The names that others give are theirs."""

from __future__ import annotations

from lightning.fabric.strategies.fsdp import _METADATA_FILENAME
from torch.distributed.checkpoint.filesystem import _metadata_fn

from lightning_tp.checkpoint.storage import layout


def test_names_of_torch_and_lightning() -> None:
    assert _metadata_fn == layout.METADATA and layout.META == _METADATA_FILENAME


def test_all_names_are_ours_to_replace() -> None:
    """`commit.py` refuses to replace a folder with other names in it."""
    assert {value for name, value in vars(layout).items() if name.isupper() and isinstance(value, str)} == layout.NAMES
