"""Note which modules of a model code calls by themselves, from outside of the forwards of all others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from lightning_tp._compat import graph_task

_CALLED = "_tp_called"  # names, kept in a module that has a step


def remember_called(root: nn.Module, names: Iterable[str]) -> None:
    """Remember that code which was followed, or compared, calls these modules of `root` by themselves."""
    root.__dict__[_CALLED] = (remembered_calls(root) or frozenset()) | set(names)


def remembered_calls(root: nn.Module) -> frozenset[str] | None:
    """Return the names of the modules of `root` for which `remember_called` was called; None if it never was."""
    names: frozenset[str] | None = root.__dict__.get(_CALLED)
    return names


@contextmanager
def outer_calls(root: nn.Module) -> Iterator[set[str]]:
    """Yield the set that names of modules with parameters come into as they are called, but those inside of another one's call.

    What has a `training_step` is code around a model. Calls in a backward pass repeat others.

    Example:
        >>> import torch
        >>> root = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
        >>> with outer_calls(root) as called:
        ...     _ = root[1](root[0](torch.zeros(1, 2)))
        >>> sorted(called)
        ['0', '1']
    """
    names = {id(m): n for n, m in root.named_modules() if is_called(m)}
    called: set[str] = set()
    running: list[nn.Module] = []

    def begin(module: nn.Module, args: Any) -> None:
        if id(module) in names:
            if not running and graph_task() == -1:
                called.add(names[id(module)])
            running.append(module)

    def end(module: nn.Module, args: Any, out: Any) -> None:
        if id(module) in names and running:
            running.pop()

    hooks = [register_module_forward_pre_hook(begin), register_module_forward_hook(end, always_call=True)]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def is_called(module: nn.Module) -> bool:
    """Return whether a module is a model or a part of one, that code around it may call: it has parameters, and no `training_step`."""
    return not hasattr(module, "training_step") and next(module.parameters(), None) is not None
