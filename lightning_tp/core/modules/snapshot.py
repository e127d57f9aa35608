"""Leave a model as it was: whatever a run of it, or styles that were bound to try them, have put into its modules; and run it without weights."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tp.core.ops.random_calls import without_dropout


@contextmanager
def preserve_modules(model: nn.Module) -> Iterator[None]:
    """Classes, attributes, parameters, buffers and hooks of all modules; not what is inside tensors.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with preserve_modules(layer):
        ...     layer.cache = layer(torch.zeros(1, 2))
        >>> hasattr(layer, "cache")
        False
    """
    kept = [(m, type(m), dict(m.__dict__), _containers(m)) for m in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for m, cls, attributes, containers in kept:
            if type(m) is not cls:
                m.__class__ = cls
            m.__dict__.clear()
            m.__dict__.update(attributes)
            for container, content in containers:
                if not content:  # most of them: the hooks that a module has not
                    if container:
                        container.clear()
                elif isinstance(container, list):
                    container[:] = content
                else:
                    container.clear()
                    container.update(content)


@contextmanager
def gc_disabled() -> Iterator[None]:
    """Without Python's collector of cycles: one pass of it over all that is imported beside a model takes up to a third of the time of
    finding its plan, and what that leaves behind is freed by counting references."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    return [(v, v.copy() if v else None) for v in module.__dict__.values() if type(v) in _CONTAINERS]


_CONTAINERS = frozenset({dict, OrderedDict, list, set})


def has_more_than(model: nn.Module, most: int) -> bool:
    """Whether a model has real weights of more than so many elements: too many to compute with, or to copy."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters) > most and not any(p.is_meta for p in parameters)


class MetaWeights:
    """A model whose parameters and buffers are on the meta device, inside `with`; with `weights()` inside that, they are back.

    What buffers hold is remembered, as `_tp_value` of what stands in for them: code may decide by it.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with MetaWeights(layer) as twin:
        ...     layer(torch.zeros(1, 2, device="meta")).is_meta
        ...     with twin.weights():
        ...         layer(torch.zeros(1, 2)).is_meta
        True
        False
    """

    def __init__(self, model: nn.Module) -> None:
        self.swaps: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
        twins: dict[int, Tensor] = {}
        for module in model.modules():
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                for name, t in table.items():
                    if t is not None and not t.is_meta:
                        twins.setdefault(id(t), _without_values(t))
                        self.swaps.append((table, name, t, twins[id(t)]))

    def __enter__(self) -> MetaWeights:
        for table, name, _, twin in self.swaps:
            table[name] = twin
        return self

    def __exit__(self, *error: object) -> None:
        for table, name, real, _ in self.swaps:
            table[name] = real

    @contextmanager
    def weights(self) -> Iterator[None]:
        """The real ones, for a while."""
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


@contextmanager
def preserve_buffers_and_rng(model: nn.Module) -> Iterator[None]:
    """Leave buffers and random state as they were; drop nothing meanwhile: runs are compared."""
    buffers = {n: b.clone() for n, b in model.named_buffers() if not b.is_meta}
    state = torch.get_rng_state()
    try:
        with without_dropout():
            yield
    finally:
        torch.set_rng_state(state)
        with torch.no_grad():
            for n, b in model.named_buffers():
                if n in buffers and b.shape == buffers[n].shape:
                    b.copy_(buffers[n])
