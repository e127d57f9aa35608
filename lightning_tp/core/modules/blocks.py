"""The repeated blocks of a model: which modules they are, which have the same code and settings, and their names, folded.

Three questions, each more expensive than the one before, and each asked of the answer to the one before:

1. Which modules are repeated blocks? `find_blocks`: children of one container with the same class and parameter shapes.
2. Which of these have the same code and settings? `block_settings`: equal up to the block's own number.
3. Which of these do the same in this call of the model? `infer.blocks.identical.identical_blocks`: it runs the model and compares operations.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

NOT_SETTINGS = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (name, module) of the repeated blocks: children of one container that have the same class and the same parameter shapes.

    The outermost such containers count: the experts inside a block are not blocks. A block that has two names (`self.backbone =
    self.model.layers`) is listed once, under the first.

    Example:
        >>> from torch import nn
        >>> [name for name, _ in find_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU()))]
        ['0', '1']
    """
    first: dict[nn.Module, str] = {}
    for name, block in _blocks(model, ""):
        first.setdefault(block, name)
    return [(name, block) for block, name in first.items()]


def _blocks(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    kinds: dict[tuple[object, ...], list[str]] = {}
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        for name, child in module.named_children():
            shapes = tuple((n, tuple(p.shape)) for n, p in child.named_parameters())
            if shapes:
                kinds.setdefault((type(child), shapes), []).append(name)
    repeated = {name for names in kinds.values() if len(names) > 1 for name in names}
    for name, child in module.named_children():
        where = f"{prefix}.{name}" if prefix else name
        if name in repeated:
            yield where, child
        else:
            yield from _blocks(child, where)


def own_numbers(blocks: Mapping[str, nn.Module]) -> dict[str, set[tuple[str, str]]]:
    """Return, for each container of blocks, the (module, attribute) in which every block keeps its own number: its key, or its index.

    Example:
        >>> layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> for i, layer in enumerate(layers):
        ...     layer.number = i
        >>> own_numbers(dict(layers.named_children()))
        {'': {('', 'number')}}
    """
    found: dict[str, set[tuple[str, str]]] = {}
    for i, (name, block) in enumerate(blocks.items()):
        holder, _, key = name.rpartition(".")
        numbers = {i, int(key)} if key.isdigit() else {i}
        mine = {
            (n, k)
            for n, m in block.named_modules()
            for k, v in m.__dict__.items()
            if isinstance(v, int) and not isinstance(v, bool) and v in numbers
        }
        found[holder] = found[holder] & mine if holder in found else mine
    return found


def block_settings(blocks: Mapping[str, nn.Module]) -> dict[str, Hashable]:
    """Return, for each block, what its code can see of itself: classes, attributes, shapes. Equal values mean the same code and settings.

    A block's own number (see `own_numbers`) does not count, nor does the value of a float: it scales, and moves nothing to another place.
    An object of a class that nothing is known about is equal to itself only. Blocks of different containers are never equal.

    Example:
        >>> layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
        >>> settings = block_settings(dict(layers.named_children()))
        >>> settings["0"] == settings["1"], settings["0"] == settings["2"]
        (True, False)
    """
    numbers = own_numbers(blocks)
    found: dict[str, Hashable] = {}
    for name, block in blocks.items():
        container = name.rpartition(".")[0]
        own = numbers[container]
        modules = tuple(
            (
                n,
                type(m),
                tuple((k, "own number" if (n, k) in own else _setting(v)) for k, v in m.__dict__.items() if k not in NOT_SETTINGS),
            )
            for n, m in block.named_modules()
        )
        tensors = tuple((n, _setting(t)) for n, t in [*block.named_parameters(), *block.named_buffers()])
        found[name] = container, modules, tensors
    return found


def _setting(value: Any) -> Hashable:
    if isinstance(value, float):
        return value != 0
    if isinstance(value, (bool, int, str, bytes, type(None), torch.dtype, torch.device, FunctionType, type)):
        return type(value), value
    if isinstance(value, Tensor):
        return "tensor", tuple(value.shape), value.dtype, value.requires_grad
    if type(value) in (list, tuple, torch.Size):
        return type(value), tuple(_setting(v) for v in value)
    if type(value) in (dict, OrderedDict):
        return type(value), tuple((_setting(k), _setting(v)) for k, v in value.items())
    return "object", id(value)


def copies_of_first(keys: Mapping[str, Hashable]) -> dict[str, str]:
    """Return name -> the first name with an equal key; names that are the first of their key are left out.

    Example:
        >>> copies_of_first({"a": 1, "b": 2, "c": 1, "d": 1})
        {'c': 'a', 'd': 'a'}
    """
    first: dict[Hashable, str] = {}
    return {name: first[key] for name, key in keys.items() if first.setdefault(key, name) != name}


def fold(names: list[str]) -> str:
    """Write names that differ in their numbers as one.

    Example:
        >>> fold(["layers.0.wq", "layers.1.wq", "layers.3.wq"])
        'layers.{0-1,3}.wq'
    """
    parts = [re.split(r"(\d+)", name) for name in names]
    folded = []
    for column in zip(*parts, strict=True):
        values = list(dict.fromkeys(column))
        folded.append(values[0] if len(values) == 1 else "{" + _spans(int(v) for v in values) + "}")
    return "".join(folded)


def _spans(numbers: Iterable[int]) -> str:
    spans: list[list[int]] = []
    for n in sorted(numbers):
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ",".join(f"{a}-{b}" if a != b else f"{a}" for a, b in spans)


def starred(name: str) -> str:
    """Replace the numbers of a dotted name by stars: what the names of repeated blocks have in common.

    Example:
        >>> starred("layers.3.wq")
        'layers.*.wq'
    """
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def enclosing(name: str, modules: Container[str]) -> str:
    """Return the innermost of `modules` that a module or parameter belongs to; "" if it belongs to none.

    Example:
        >>> enclosing("layers.3.mlp.weight", {"layers.3", "layers.4"})
        'layers.3'
    """
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name
