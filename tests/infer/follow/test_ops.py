from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_tp.infer.follow import ops

SETS = {name: value for name, value in vars(ops).items() if isinstance(value, frozenset) and name.isupper()}
UNNAMED = {"__get__", "_safe_softmax", "_grouped_mm", "__idiv__", "rms_norm"}  # `.shape`, and names that not every torch has


@pytest.mark.parametrize("name", SETS)
def test_names_are_those_of_torch(name: str) -> None:
    """A name that is spelled wrongly would change nothing without a word."""
    spaces = [torch.ops.aten] if name.startswith("ATEN_") else [torch.Tensor, torch, F]
    assert {op for op in SETS[name] - UNNAMED if not any(hasattr(space, op) for space in spaces)} == set()


def test_classes_that_are_told_apart_have_nothing_in_common() -> None:
    assert not ops.ATEN_MOVES & (ops.ATEN_REDUCTIONS | ops.ATEN_POINTWISE | ops.ATEN_LIKE | ops.ATEN_CASTS)
    assert not ops.MOVES & (ops.PRODUCTS | ops.NOT_BROADCASTING | ops.RANDOM)
    assert ops.MOVES_ALONG_ONE_DIM <= ops.MOVES and ops.TRIANGLES <= ops.BY_POSITION


@pytest.mark.parametrize(
    ("name", "keywords", "writes"),
    [
        ("add_", (), True),
        ("__iadd__", (), True),
        ("__setitem__", (), True),
        ("add", {"out": 0}, True),
        ("add", {"alpha": 0}, False),
        ("__add__", (), False),
        ("__init__", (), False),
    ],
)
def test_what_writes_in_place(name: str, keywords: dict[str, int], writes: bool) -> None:
    assert ops.writes_in_place(name, keywords) == writes
