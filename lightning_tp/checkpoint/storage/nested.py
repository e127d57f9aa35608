"""Walk over nestings of dicts, lists and tuples, as checkpoints are, and refer to the DTensors that callbacks and hooks put there.

torch's pytrees take dicts of a user's own class for leaves; in a checkpoint (hyperparameters, states of callbacks) their values count. DTensors
go to a folder of their own: rank 0, which writes `meta.pt`, has but its shards of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.distributed.tensor import DTensor

from lightning_tp.checkpoint.storage.path import SHARDED

Path = tuple[Any, ...]  # keys and indices


def map_nested(function: Callable[[Any, Path], Any], tree: Any, *, path: Path = (), copy: bool = True) -> Any:
    """Return the same nesting with `function(node, path)` in place of each node for which that is another object, and of all leaves.

    Args:
        function: called with each container before what is in it, and with each leaf. What it returns for a container is taken as it is;
            if it returns the container itself, what is in it comes next.
        tree: dicts, lists and tuples inside each other; anything else is a leaf.
        path: of `tree`.
        copy: whether containers in which nothing changes are copied; else they are the same objects.
    """
    mapped = function(tree, path)
    if mapped is not tree:
        return mapped
    if isinstance(tree, dict):
        values = {k: map_nested(function, v, path=(*path, k), copy=copy) for k, v in tree.items()}
        return values if copy or any(v is not tree[k] for k, v in values.items()) else tree
    if type(tree) in (list, tuple):
        items = [map_nested(function, v, path=(*path, i), copy=copy) for i, v in enumerate(tree)]
        return type(tree)(items) if copy or any(a is not b for a, b in zip(items, tree, strict=True)) else tree
    return tree


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield (path, leaf) of everything that is no dict, list or tuple, in order."""
    if isinstance(tree, dict):
        for k, v in tree.items():
            yield from leaves(v, (*path, k))
    elif type(tree) in (list, tuple):
        for i, v in enumerate(tree):
            yield from leaves(v, (*path, i))
    else:
        yield path, tree


def without_dtensors(tree: Any, found: dict[str, DTensor], where: str = "") -> Any:
    """Return the same nesting with a reference in place of each DTensor, which goes to `found`; what holds none is the same object."""

    def take_out(node: Any, path: tuple[Any, ...]) -> Any:
        if not isinstance(node, DTensor):
            return node
        name = "/".join(map(str, path))
        found[name] = node
        return {SHARDED: name, "name": str(path[-1])}

    return map_nested(take_out, tree, path=(where,), copy=False)


def replace_references(tree: Any, read: Callable[[str, str], Any]) -> Any:
    """Return the same nesting with `read(path, name)` in place of each reference, where `name` is the last part of the path."""

    def fill(node: Any, _: tuple[Any, ...]) -> Any:
        is_reference = isinstance(node, dict) and isinstance(node.get(SHARDED), str)
        return read(node[SHARDED], str(node["name"])) if is_reference else node

    return map_nested(fill, tree, copy=False)
