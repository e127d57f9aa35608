from __future__ import annotations

import torch
from torch import Tensor

from lightning_tp.shards import functions

KINDS = {name: names for name, names in vars(functions).items() if isinstance(names, frozenset)}


def test_each_name_is_one_of_torchs() -> None:
    known = {*dir(Tensor), *dir(torch), "untyped_"}
    unknown = {kind: sorted(names - known) for kind, names in KINDS.items()}
    assert not any(unknown.values()), unknown


def test_each_name_has_one_rule() -> None:
    rules = [KINDS[kind] for kind in ("AS_IT_IS", "ALIKE", "COPIES", "POINTERS", "POINTWISE", "SIZES", "VIEWS")]
    assert sum(map(len, rules)) == len(frozenset().union(*rules))
