"""Leave the objects that some code reaches as they were before it ran: their attributes, containers, tensors, generators and iterators."""

from __future__ import annotations

import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from io import IOBase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from lightning_tp._compat import local_tensor

MOST_ITEMS = 4096  # of a container, above which its items are not looked into: data
MOST_OBJECTS = 200_000  # that are looked at
MOST_COPIED = 2**22  # elements of all tensors that are restored; buffers of modules are not among them
_TABLES = frozenset({dict, OrderedDict, list, set})
_CONTAINERS = (dict, list, set, deque, bytearray)
_LEAVES = (
    type,
    types.ModuleType,
    types.BuiltinFunctionType,
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
    nn.Parameter,
    torch.device,
    torch.dtype,
)
# of the standard library, whose objects hold what code changes; others lead to the process: loggers, streams, locks, event loops
_OF_CODE = frozenset(
    {"__main__", "argparse", "array", "builtins", "collections", "functools", "itertools", "queue", "random", "types"}
)
_WHO_LOOKS = ("lightning_tp.infer.", "lightning_tp.core.")  # what follows a run by hooks keeps what it has seen
_MESH = (
    "torch.distributed."  # FSDP2's states, whose tensors are left alone: they are gathered again, and a write would show in a graph
)


class Replayed(Iterator[Any]):
    """An iterator that gives the same items again after `rewind`; nothing that it was asked for is lost."""

    def __init__(self, source: Iterator[Any]) -> None:
        self.source, self.items, self.at = source, [], 0  # type: ignore[var-annotated]

    def __next__(self) -> Any:
        if self.at == len(self.items):
            self.items.append(next(self.source))
        self.at += 1
        return self.items[self.at - 1]

    def rewind(self, at: int) -> None:
        self.at = at


class Reachable:
    """What some roots reach, as it is now. Iterators that have no copy are replaced by ones that can go back."""

    def __init__(self, roots: Iterable[Any], without: Iterable[Any] = ()) -> None:
        self.undo: list[Callable[[], Any]] = []
        self.copied = 0
        self.seen = {id(x): x for x in without}
        todo = list(roots)
        while todo and len(self.seen) < MOST_OBJECTS:
            todo += self._save(todo.pop())

    def restore(self) -> None:
        """Bring everything back to what it was."""
        with torch.no_grad():
            for undo in self.undo:
                undo()

    def _save(self, x: Any) -> list[Any]:
        """Note how to restore one object, and return those that it leads to."""
        if isinstance(x, _LEAVES) or id(x) in self.seen or _is_apart(x):
            return []
        self.seen[id(x)] = x
        if isinstance(x, Tensor):
            self._save_tensor(x)
            return []
        if isinstance(x, nn.Module):
            return self._save_module(x)
        if isinstance(x, (types.FunctionType, types.MethodType, partial)):
            return _of_function(x)
        for get, put in (("get_state", "set_state"), ("getstate", "setstate")):
            if isinstance(x, (torch.Generator, random.Random)) and hasattr(x, get):
                self.undo.append(partial(getattr(x, put), getattr(x, get)()))
        if type(x).__module__.partition(".")[0] == "numpy":
            self._save_numpy(x)
            return []
        if isinstance(x, Replayed):
            self.undo.append(partial(x.rewind, x.at))
            return []
        if isinstance(x, _CONTAINERS):
            return self._save_container(x)
        if isinstance(x, (tuple, frozenset)):
            return list(x) if len(x) <= MOST_ITEMS else []
        return self._save_attributes(x)

    def _save_module(self, module: nn.Module) -> list[Any]:
        """Most of what a module has are empty tables of hooks: these take no time."""
        self.seen.update((id(b), b) for b in module.buffers(recurse=False))
        attributes, found = vars(module), []
        self._replay(attributes)
        self.undo.append(partial(_refill, attributes, attributes.copy()))
        for value in attributes.values():
            if type(value) in _TABLES and not value:
                self.undo.append(value.clear)
            elif value is not None and type(value) is not bool:
                found.append(value)
        return found

    def _replay(self, x: Any) -> None:
        for key, value in list(x.items() if isinstance(x, dict) else enumerate(x)):
            if type(value).__module__ in ("builtins", "itertools") and isinstance(value, Iterator):
                x[key] = Replayed(value)

    def _save_tensor(self, t: Tensor) -> None:
        self.copied += t.numel()
        if t.is_meta or self.copied > MOST_COPIED or t.layout is not torch.strided:
            return
        if local_tensor(t).untyped_storage().nbytes() < local_tensor(t).nbytes:
            return  # FSDP2 has freed the memory of an unsharded parameter
        copy, needs = t.detach().clone(), t.requires_grad

        def undo() -> None:
            if t.is_leaf:
                t.requires_grad_(needs)
            t.detach().copy_(copy)

        self.undo.append(undo)

    def _save_numpy(self, x: Any) -> None:
        if hasattr(x, "bit_generator"):  # Generator
            self.undo.append(partial(setattr, x.bit_generator, "state", x.bit_generator.state))
        elif hasattr(x, "flags") and x.ndim and x.size <= MOST_COPIED and x.flags.writeable:
            self.undo.append(partial(x.__setitem__, Ellipsis, x.copy()))
        elif hasattr(x, "get_state"):  # RandomState
            self.undo.append(partial(x.set_state, x.get_state()))

    def _save_container(self, x: Any) -> list[Any]:
        if not x:
            self.undo.append(x.clear)
            return []
        if isinstance(x, (dict, list)) and len(x) <= MOST_ITEMS:
            self._replay(x)
        self.undo.append(partial(_refill, x, x.copy()))
        if len(x) > MOST_ITEMS or isinstance(x, bytearray):
            return []
        return list(x.values() if isinstance(x, dict) else x)

    def _save_attributes(self, x: Any) -> list[Any]:
        found = []
        if isinstance(attributes := getattr(x, "__dict__", None), dict):
            found.append(attributes)
            if type(x).__module__.startswith(_MESH):
                self.seen.update((id(t), t) for t in tree_iter(list(attributes.values())) if isinstance(t, Tensor))
        slots = (n for cls in type(x).__mro__ for n in _slots(cls) if hasattr(x, n))
        for name in slots:
            value = getattr(x, name)
            self.undo.append(partial(_put, x, name, value))
            found.append(value)
        return found


def _is_apart(x: Any) -> bool:
    """Return whether an object is none of the step: it looks at the step, or leads out of it to the process."""
    if isinstance(x, (nn.Module, Tensor)):
        return False
    name = type(x).__module__
    package = name.partition(".")[0]
    if name.startswith(_WHO_LOOKS):
        return not isinstance(x, Replayed)
    return isinstance(x, IOBase) or (package in sys.stdlib_module_names and package not in _OF_CODE)


def _slots(cls: type) -> list[str]:
    slots = vars(cls).get("__slots__", ()) if isinstance(vars(cls).get("__init__"), types.FunctionType) else ()
    names = [slots] if isinstance(slots, str) else list(slots)
    return [
        n if not n.startswith("__") else f"_{cls.__name__.lstrip('_')}{n}" for n in names if n not in ("__dict__", "__weakref__")
    ]


def _of_function(x: Any) -> list[Any]:
    if isinstance(x, partial):
        return [x.func, x.args, x.keywords]
    if isinstance(x, types.MethodType):
        return [x.__self__, x.__func__]
    cells = []
    for cell in x.__closure__ or ():
        with suppress(ValueError):  # empty
            cells.append(cell.cell_contents)
    return [*cells, *(x.__defaults__ or ()), x.__dict__]


def _put(x: Any, name: str, value: Any) -> None:
    if getattr(x, name, None) is not value:
        object.__setattr__(x, name, value)  # also of what is frozen


def _refill(x: Any, content: Any) -> None:
    """Give a container this content again, whatever its class makes of `clear` and `update`."""
    base: Any = next(cls for cls in (OrderedDict, dict, list, set, deque, bytearray) if isinstance(x, cls))
    base.clear(x)
    (base.update if issubclass(base, (dict, set)) else base.extend)(x, content)


@contextmanager
def preserve_objects(roots: Iterable[Any], without: Iterable[Any] = ()) -> Iterator[None]:
    """Restore on exit what these roots reach, and the random generators of torch, of Python and of numpy.

    Args:
        roots: modules, callbacks, functions (what they close over), containers: anything.
        without: objects that are not looked into.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.seen = [0]
        >>> with preserve_objects([layer]):
        ...     layer.seen.append(1)
        >>> layer.seen
        [0]
    """
    import numpy as np

    saved = Reachable(roots, without)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        saved.restore()
