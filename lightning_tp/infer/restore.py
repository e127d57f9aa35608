"""Leave a model as it was: whatever a run of it, or styles that were bound to try them, have put into its modules."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def modules_as_they_were(model: nn.Module) -> Iterator[None]:
    """Classes, attributes, parameters, buffers and hooks of all modules; not what is inside tensors.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with modules_as_they_were(layer):
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
                if isinstance(container, list):
                    container[:] = content
                else:
                    container.clear()
                    container.update(content)


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    return [(v, v.copy()) for v in module.__dict__.values() if type(v) in (dict, OrderedDict, list, set)]
