"""Nestings of dicts, lists and tuples: mapped with paths, their leaves; DTensors are taken out, and put back where they were."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import torch
from torch.distributed.tensor import DTensor, Replicate

from lightning_tp.checkpoint.storage.nested import leaves, map_nested, replace_references, without_dtensors
from lightning_tp.testing import single_rank_mesh

Pair = namedtuple("Pair", "a b")
TREE = OrderedDict(a=[1, (2, "x")], b={"c": None, 3: Pair(4, 5)})


def test_leaves_have_paths() -> None:
    """A named tuple is a leaf: it can't be built of a list."""
    expected = [(("a", 0), 1), (("a", 1, 0), 2), (("a", 1, 1), "x"), (("b", "c"), None), (("b", 3), Pair(4, 5))]
    assert list(leaves(TREE)) == expected and list(leaves(7)) == [((), 7)]


def test_what_is_mapped() -> None:
    seen: list[tuple[object, ...]] = []

    def double(node: object, path: tuple[object, ...]) -> object:
        seen.append(path)
        return node * 2 if isinstance(node, int) else node

    got = map_nested(double, TREE, path=("top",))
    assert got == {"a": [2, (4, "x")], "b": {"c": None, 3: Pair(4, 5)}} and type(got) is dict
    assert seen[:3] == [("top",), ("top", "a"), ("top", "a", 0)] and type(got["a"][1]) is tuple


def test_a_container_may_be_replaced_as_one() -> None:
    got = map_nested(lambda node, path: "tuple" if type(node) is tuple else node, TREE)
    assert got["a"] == [1, "tuple"]


def test_copies_or_the_same_objects() -> None:
    """With `copy`, nothing that is returned changes when the tree does; without, what is unchanged is the same."""
    copied = map_nested(lambda node, path: node, TREE)
    assert copied == TREE and copied is not TREE and copied["a"] is not TREE["a"] and copied["b"] is not TREE["b"]
    assert map_nested(lambda node, path: node, TREE, copy=False) is TREE
    got = map_nested(lambda node, path: 9 if path == ("a", 0) else node, TREE, copy=False)
    assert got["a"] == [9, (2, "x")] and got["a"][1] is TREE["a"][1] and got["b"] is TREE["b"] and TREE["a"][0] == 1


# DTensors; with ranks and files: `test_sharded.py`


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
