from __future__ import annotations

from collections import OrderedDict, UserDict, deque, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_tp.core.trees import leaves_in, map_tensors, named_leaves_in, tensors_in

Pair = namedtuple("Pair", ["image", "text"])


@dataclass
class Sample:
    x: Tensor
    name: str


def ones(n: int) -> Tensor:
    return torch.ones(n)


TREES: dict[str, tuple[Any, list[tuple[str, int]]]] = {
    "a tensor": (ones(1), [("", 1)]),
    "nothing": (None, []),
    "containers": ([ones(1), (ones(2), {"a": ones(3)})], [("[0]", 1), ("[1][0]", 2), ("[1][1]['a']", 3)]),
    "order of insertion": (OrderedDict(b=ones(1), a=ones(2)), [("['b']", 1), ("['a']", 2)]),
    "a deque": (deque([ones(1), "text"]), [("[0]", 1)]),
    "a named tuple": (Pair(ones(1), "text"), [(".image", 1)]),
    "another mapping": ({"m": UserDict(x=ones(1))}, [("['m']['x']", 1)]),
    "a dataclass": ([Sample(ones(2), "name")], [("[0]['x']", 2)]),
    "inside each other": (SimpleNamespace(a=UserDict(b=SimpleNamespace(c=ones(3)))), [("['a']['b']['c']", 3)]),
    "too deep": (SimpleNamespace(a=UserDict(b=SimpleNamespace(c=SimpleNamespace(d=ones(3))))), []),
    "a module, a generator": ([torch.nn.Linear(2, 2), (ones(1) for _ in range(2))], []),
}


@pytest.mark.parametrize("kind", TREES)
def test_both_walks_find_the_same(kind: str) -> None:
    tree, expected = TREES[kind]
    assert [(name, len(t)) for name, t in named_leaves_in(tree) if isinstance(t, Tensor)] == expected
    assert [len(t) for t in tensors_in(tree)] == [length for _, length in expected]


def test_leaves_that_are_no_tensors() -> None:
    tree = {"x": [ones(1), "text"], "o": SimpleNamespace(a=None, b=UserDict(c=3))}
    assert [(name, leaf) for name, leaf in named_leaves_in(tree) if not isinstance(leaf, Tensor)] == [
        ("['x'][1]", "text"), ("['o']['a']", None), ("['o']['b']['c']", 3),
    ]  # fmt: skip
    assert [leaf for leaf in leaves_in(tree) if not isinstance(leaf, Tensor)] == ["text", None, 3]


def test_depth_counts_objects_only() -> None:
    tree = [[[[ones(1)]]], UserDict(x=ones(2))]
    assert (
        [len(t) for t in tensors_in(tree, depth=0)]
        == [1]
        == [len(t) for _, t in named_leaves_in(tree, depth=0) if isinstance(t, Tensor)]
    )


def test_map_builds_the_tree_anew() -> None:
    tree = {"x": ones(2), "pair": Pair(ones(3), "text"), "n": 4}
    assert map_tensors(len, tree) == {"x": 2, "pair": Pair(3, "text"), "n": 4}
    assert isinstance(tree["x"], Tensor)  # the first one is as it was
