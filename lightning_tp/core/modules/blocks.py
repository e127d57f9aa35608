"""Find the repeated blocks of a model, and fold their numbered names for display."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping

from torch import nn


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated blocks of a model: children of one container that have the same class and the same parameter shapes.

    The outermost such containers count: the experts inside a block are not blocks. A block that has two names (`self.backbone =
    self.model.layers`) is one, by the first.

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
    """For each container of blocks, (module, attribute) in which every block keeps its own number: its key, or its place among all.

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


def fold(names: list[str]) -> str:
    """`layers.0.wq`, `layers.1.wq` -> `layers.{0-1}.wq`."""
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
    """`layers.3.wq` -> `layers.*.wq`: what blocks have in common."""
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
