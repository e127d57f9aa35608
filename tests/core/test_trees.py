"""Tensors in batches: in containers, mappings of any class, attributes of objects."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lightning_tp.core.trees import map_tensors, named_tensors_in, tensors_in


@dataclass
class Batch:
    tokens: Tensor
    more: Any = None


A, B, C = torch.zeros(1), torch.zeros(2), torch.zeros(3)


def found(tree: Any, depth: int = 3) -> list[int]:
    return [t.numel() for t in tensors_in(tree, depth)]


def test_all_kinds_of_containers() -> None:
    assert found(A) == [1] and found([A, ("text", {"x": B, "n": 3}), None]) == [1, 2]
    assert found(UserDict({"x": B, "y": [C]})) == [2, 3]
    assert found(Batch(A, SimpleNamespace(x=C, name="n"))) == [1, 3]
    assert found(iter([A])) == [] and found(lambda: A) == []  # a look at an iterator would use it up


def test_how_deep_objects_are_looked_into() -> None:
    nested = Batch(A, Batch(B, Batch(C)))
    assert found(nested, 0) == [] and found(nested, 1) == [1] and found(nested, 2) == [1, 2] and found(nested) == [1, 2, 3]
    assert found([[[[A]]]], 0) == [1]  # containers don't count


def test_names() -> None:
    tree = {"x": A, "more": [B, Batch(C, UserDict({"y": A}))]}
    got = list(named_tensors_in(tree))
    assert [name for name, _ in got] == ["['x']", "['more'][0]", "['more'][1]['tokens']", "['more'][1]['more']['y']"]
    assert [t.numel() for _, t in got] == found(tree) == [1, 2, 3, 1]
    assert [name for name, _ in named_tensors_in(tree, 0)] == ["['x']", "['more'][0]"]


def test_a_map_leaves_other_leaves_alone() -> None:
    assert map_tensors(Tensor.numel, {"x": B, "more": [C, "text", 5]}) == {"x": 2, "more": [3, "text", 5]}
