"""The one walk over trees of tensors: batches, inputs and outputs of models.

torch's pytrees know lists, tuples, dicts and registered classes. Batches have more in them: mappings of any class (Hugging Face's
`BatchEncoding`), dataclasses, objects with attributes. `tensors_in` and `named_tensors_in` look into these as well; `map_tensors`, which has
to build the tree anew, does not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_map_only

_NO_ATTRIBUTES = (str, bytes, int, float, complex, type(None))  # the usual leaves beside tensors: skip them at once


def tensors_in(tree: Any, depth: int = 3) -> Iterator[Tensor]:
    """Yield the tensors of a tree, in order. Fast enough to run for every batch.

    Args:
        tree: Tensors in containers, in mappings of any class, and in attributes of objects.
        depth: How many objects (or mappings that are no dict) inside each other to look into.

    Example:
        >>> import torch
        >>> [t.shape for t in tensors_in({"x": torch.ones(2), "more": [torch.ones(3), "text"]})]
        [torch.Size([2]), torch.Size([3])]
    """
    return (leaf for leaf in leaves_in(tree, depth) if isinstance(leaf, Tensor))


def leaves_in(tree: Any, depth: int = 3) -> Iterator[Any]:
    """Yield the tensors that `tensors_in` finds, and what else there is in between: text, numbers, objects without attributes."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (dict, list, tuple, deque)):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves_in(item, depth)
    elif depth and (attributes := _attributes(tree)):
        for item in attributes.values():
            yield from leaves_in(item, depth - 1)
    else:
        yield tree


def named_leaves_in(tree: Any, depth: int = 3) -> Iterator[tuple[str, Any]]:
    """Yield (path, leaf) of what `leaves_in` finds; the path of a tree that is a leaf itself is empty.

    Example:
        >>> import torch
        >>> [name for name, _ in named_leaves_in({"x": torch.ones(1), "more": [torch.ones(2), "text"]})]
        ["['x']", "['more'][0]", "['more'][1]"]
    """
    leaves, _ = tree_flatten_with_path(tree)
    for path, leaf in leaves:
        if not isinstance(leaf, Tensor) and depth and (attributes := _attributes(leaf)):
            for below, found in named_leaves_in(attributes, depth - 1):
                yield "".join(map(str, path)) + below, found
        else:
            yield "".join(map(str, path)), leaf


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Return the same pytree with `function(t)` in place of each tensor `t`; other leaves stay as they are.

    Example:
        >>> import torch
        >>> map_tensors(lambda t: t.shape, {"x": torch.ones(2), "n": 3})
        {'x': torch.Size([2]), 'n': 3}
    """
    return tree_map_only(Tensor, function, tree)


def _attributes(leaf: Any) -> dict[str, Any] | None:
    """Return what a leaf of torch's pytrees holds by name: the items of a mapping, the attributes of an object."""
    if isinstance(leaf, _NO_ATTRIBUTES) or callable(leaf) or isinstance(leaf, Iterator):
        return None
    return dict(leaf) if isinstance(leaf, Mapping) else getattr(leaf, "__dict__", None)
