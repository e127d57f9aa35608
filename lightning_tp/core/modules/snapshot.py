"""Leave a model as it was after it has been run or changed for a try, and run it without its weights."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tp._compat import own_buffers, own_parameters

_CONTAINERS = frozenset({dict, OrderedDict, list, set})


@contextmanager
def preserve_modules(model: nn.Module) -> Iterator[None]:
    """Restore the classes, attributes, parameters, buffers and hooks of all modules on exit; not what is inside tensors.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with preserve_modules(layer):
        ...     layer.cache = layer(torch.zeros(1, 2))
        >>> hasattr(layer, "cache")
        False
    """
    # most containers are empty, such as the hooks that a module has not: these need no copy
    saved = [
        (m, type(m), dict(m.__dict__), [(v, v.copy() if v else ()) for v in m.__dict__.values() if type(v) in _CONTAINERS])
        for m in model.modules()
    ]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for m, cls, attributes, containers in saved:
            if type(m) is not cls:
                m.__class__ = cls
            m.__dict__.clear()
            m.__dict__.update(attributes)
            for container, content in containers:
                if container or content:
                    container.clear()
                    container.extend(content) if isinstance(container, list) else container.update(content)


@contextmanager
def gc_disabled() -> Iterator[None]:
    """Disable Python's collector of cycles until this exits: its passes take up to a third of the time of inferring a plan."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def has_more_than(model: nn.Module, num_elements: int) -> bool:
    """Return whether a model has more parameters than that, and none of them on the meta device: too many to compute with, or to copy."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters) > num_elements and not any(p.is_meta for p in parameters)


class MetaWeights:
    """A context in which a model's parameters and buffers are on the meta device; `weights()` brings them back inside of it for a while.

    A meta buffer has the real one as its attribute `_tp_value`, since code may branch on its values.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with MetaWeights(layer) as meta:
        ...     layer(torch.zeros(1, 2, device="meta")).is_meta
        ...     with meta.weights():
        ...         layer(torch.zeros(1, 2)).is_meta
        True
        False
    """

    def __init__(self, model: nn.Module) -> None:
        self.swaps: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []  # (parameters or buffers of a module, name, real, meta)
        on_meta: dict[int, Tensor] = {}
        for module in model.modules():
            for table in (own_parameters(module), own_buffers(module)):
                for name, t in table.items():
                    if t is not None and not t.is_meta:
                        on_meta.setdefault(id(t), _without_values(t))
                        self.swaps.append((table, name, t, on_meta[id(t)]))

    def __enter__(self) -> MetaWeights:
        for table, name, _, meta in self.swaps:
            table[name] = meta
        return self

    def __exit__(self, *error: object) -> None:
        for table, name, real, _ in self.swaps:
            table[name] = real

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Bring the real parameters and buffers back until this exits."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


def _without_values(t: Tensor) -> Tensor:
    meta = t.detach().to("meta")
    if isinstance(t, nn.Parameter):
        return nn.Parameter(meta, t.requires_grad)
    meta._tp_value = t  # type: ignore[attr-defined]
    return meta
