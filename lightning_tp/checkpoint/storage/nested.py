"""Walk over nestings of dicts, lists and tuples, as state dicts and checkpoints are; anything else is a leaf.

torch's pytrees take dicts of a user's own class for leaves; in a checkpoint (hyperparameters, states of callbacks) their values count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Path = tuple[Any, ...]  # keys and indices


def map_nested(function: Callable[[Any, Path], Any], tree: Any, *, path: Path = (), copy: bool = True) -> Any:
    """Return the same nesting with `function(node, path)` in place of each node for which that is another object, and of all leaves.

    Args:
        function: called with each container before what is in it, and with each leaf. What it returns for a container is taken as it is;
            if it returns the container itself, what is in it comes next.
        tree: dicts, lists and tuples inside each other.
        path: of `tree`.
        copy: whether containers in which nothing changes are copied; else they are the same objects.

    Example:
        >>> map_nested(lambda node, path: node * 2 if isinstance(node, int) else node, {"a": [1, (2, "x")]})
        {'a': [2, (4, 'x')]}
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
    """Yield (path, leaf) of everything that is no dict, list or tuple, in order.

    Example:
        >>> list(leaves({"a": [1, (2,)]}))
        [(('a', 0), 1), (('a', 1, 0), 2)]
    """
    if isinstance(tree, dict):
        for k, v in tree.items():
            yield from leaves(v, (*path, k))
    elif type(tree) in (list, tuple):
        for i, v in enumerate(tree):
            yield from leaves(v, (*path, i))
    else:
        yield path, tree
