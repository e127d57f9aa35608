"""The one walk over trees of tensors: batches, inputs, outputs of models.

torch's pytrees know lists, tuples, dicts and registered classes. Batches have more in them: mappings of any class (Hugging Face's
`BatchEncoding`), dataclasses, objects with attributes. These are looked into here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_map_only

_PLAIN = (str, bytes, int, float, complex, type(None))


def tensors_in(tree: Any, depth: int = 3) -> Iterator[Tensor]:
    """Yield the tensors of a tree, in order. Fast enough for every batch.

    Args:
        tree: tensors in containers, in mappings of any class, and in attributes of objects.
        depth: how many objects inside each other are looked into.

    Example:
        >>> import torch
        >>> [t.shape for t in tensors_in({"x": torch.ones(2), "more": [torch.ones(3), "text"]})]
        [torch.Size([2]), torch.Size([3])]
    """
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (dict, list, tuple)):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors_in(item, depth)
    elif depth and (inside := _inside(tree)):
        for item in inside.values():
            yield from tensors_in(item, depth - 1)


def named_tensors_in(tree: Any, depth: int = 3) -> Iterator[tuple[str, Tensor]]:
    """Yield (path, tensor) of the tensors that `tensors_in` finds.

    Example:
        >>> import torch
        >>> [name for name, _ in named_tensors_in({"x": torch.ones(1), "more": [torch.ones(2), "text"]})]
        ["['x']", "['more'][0]"]
    """
    leaves, _ = tree_flatten_with_path(tree)
    for path, leaf in leaves:
        if isinstance(leaf, Tensor):
            yield "".join(map(str, path)), leaf
        elif depth and (inside := _inside(leaf)):
            for below, t in named_tensors_in(inside, depth - 1):
                yield "".join(map(str, path)) + below, t


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Return the same tree with `function(t)` instead of each tensor `t`; leaves of other kinds stay as they are.

    Example:
        >>> import torch
        >>> map_tensors(lambda t: t.shape, {"x": torch.ones(2), "n": 3})
        {'x': torch.Size([2]), 'n': 3}
    """
    return tree_map_only(Tensor, function, tree)


def _inside(leaf: Any) -> dict[str, Any] | None:
    if isinstance(leaf, _PLAIN) or callable(leaf) or isinstance(leaf, Iterator):
        return None
    return dict(leaf) if isinstance(leaf, Mapping) else getattr(leaf, "__dict__", None)
