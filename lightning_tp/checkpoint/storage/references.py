"""References to DTensors in what one rank writes for all: the DTensors themselves are in a folder of their own.

Callbacks and hooks may put DTensors into a checkpoint. `meta.pt` is written by the first rank, which has but its shards of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.distributed.tensor import DTensor

from lightning_tp.checkpoint.storage.layout import SHARDED
from lightning_tp.checkpoint.storage.nested import map_nested


def without_dtensors(tree: Any, found: dict[str, DTensor], where: str = "") -> Any:
    """Return the same nesting with a reference in place of each DTensor; what holds none is the same object.

    Args:
        tree: dicts, lists and tuples inside each other.
        found: gets the DTensors, by the paths that the references name.
        where: the path of `tree`.
    """

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
