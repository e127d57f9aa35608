"""DTensors of callbacks: taken out, and put back where they were. With ranks and files: `test_sharded.py`."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, Replicate

from lightning_tp.checkpoint.storage.references import replace_references, without_dtensors
from lightning_tp.testing import single_rank_mesh


def test_out_and_in_again() -> None:
    with single_rank_mesh() as mesh:
        one, two = (DTensor.from_local(torch.full((2,), float(i)), mesh, [Replicate()] * mesh.ndim) for i in (1, 2))
    plain = {"t": torch.ones(3)}
    tree = {"ema": {"w": one}, "list": [plain, (two, 5)]}
    found: dict[str, DTensor] = {}
    left = without_dtensors(tree, found, "mine")
    assert found == {"mine/ema/w": one, "mine/list/1/0": two}
    assert left["ema"] == {"w": {"lightning_tp_sharded": "mine/ema/w", "name": "w"}} and left["list"][0] is plain
    assert tree["ema"]["w"] is one, "the user's own"
    names: dict[str, str] = {}
    replace_references(left, names.setdefault)
    assert names == {"mine/ema/w": "w", "mine/list/1/0": "0"}
    back = replace_references(left, lambda path, name: found[path])
    assert back["ema"]["w"] is one and back["list"][1] == (two, 5) and back["list"][0] is plain


def test_what_has_none_is_the_same() -> None:
    tree = {"a": [torch.ones(2)], "lightning_tp_sharded": 3}
    assert without_dtensors(tree, {}) is tree and replace_references(tree, lambda *_: 0) is tree
