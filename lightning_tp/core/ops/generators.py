"""Random generators that user code has made for itself: found where its objects hold them, saved, and set alike on all ranks of a group.

Found are `random.Random`, `torch.Generator`, and NumPy's `Generator` and `RandomState`, in attributes, containers, closures, defaults, partials, and
in global variables of the user's functions. torch's, Python's and NumPy's default generators are no objects of the user; see `rng.py`.
"""

from __future__ import annotations

import pickle
import random
import sys
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_tp.core.ops.rng import local_state, set_local_state

MOST_OBJECTS = 50_000  # that are looked at
MOST_ITEMS = 100  # of a list or a dict: one of the same thing
_PLAIN = (str, bytes, int, float, complex, bool, type(None), Tensor, ModuleType, BuiltinFunctionType, torch.dtype, torch.device)
_LIBRARIES = {
    "torch",
    "lightning",
    "pytorch_lightning",
    "lightning_tp",
    "lightning_fabric",
    "numpy",
    "transformers",
    "torchmetrics",
}
_LIBRARIES |= set(sys.stdlib_module_names) - {"__main__"}
_WITHOUT = {
    "lightning",
    "pytorch_lightning",
    "lightning_tp",
    "lightning_fabric",
}  # what only holds what is looked at anyway, such as a Trainer

Generators = dict[str, Any]  # by the path on which each was found


def generators_in(roots: Mapping[str, Any]) -> Generators:
    """Return the random generators that these objects hold, by the paths to them; the same on ranks that run the same program.

    Example:
        >>> from types import SimpleNamespace
        >>> list(generators_in({"noise": SimpleNamespace(sources=[random.Random(0)])}))
        ['noise.sources[0]']
    """
    found: Generators = {}
    seen: set[int] = set()
    queue: deque[tuple[str, Any]] = deque(roots.items())
    while queue and len(seen) < MOST_OBJECTS:
        path, value = queue.popleft()
        if isinstance(value, _PLAIN) or id(value) in seen:
            continue
        seen.add(id(value))
        if is_generator(value):
            found[path] = value
        elif type(value).__module__.partition(".")[0] not in _WITHOUT:
            queue.extend(_held_by(path, value))
    return found


def is_generator(value: Any) -> bool:
    """Return whether this is a random generator; Python's hidden one and torch's defaults are none of the user's."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.RandomState)):
        return True
    if isinstance(value, random.SystemRandom) or value is torch.default_generator:
        return False
    return isinstance(value, (torch.Generator, random.Random))


def _held_by(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        if isinstance(value, dict):
            yield from ((f"{path}[{key!r}]", item) for key, item in list(value.items())[:MOST_ITEMS])
    elif isinstance(value, (list, tuple, deque)):
        yield from ((f"{path}[{i}]", item) for i, item in zip(range(MOST_ITEMS), value, strict=False))
    elif isinstance(value, partial):
        yield from ((f"{path}.func", value.func), (f"{path}.args", value.args), (f"{path}.keywords", value.keywords))
    elif isinstance(value, MethodType):
        yield from ((f"{path}.__self__", value.__self__), (f"{path}.__func__", value.__func__))
    elif isinstance(value, FunctionType):
        yield from _held_by_function(path, value)
    elif isinstance(value, type):
        if _is_users(value):
            yield from (
                (f"{path}.{name}", item) for name, item in vars(value).items() if not name.startswith("__") or callable(item)
            )
    else:
        yield from ((f"{path}.{name}", item) for name, item in getattr(value, "__dict__", {}).items())
        slots = [n for cls in type(value).__mro__ if _is_users(cls) for n in getattr(cls, "__slots__", ()) if isinstance(n, str)]
        yield from ((f"{path}.{name}", getattr(value, name, None)) for name in slots)
        yield from ((f"{path}:{cls.__qualname__}", cls) for cls in type(value).__mro__ if _is_users(cls))


def _held_by_function(path: str, function: FunctionType) -> Iterator[tuple[str, Any]]:
    if not _is_users(function):
        return
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"{path}<{name}>", cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield f"{path}.__defaults__", function.__defaults__
    yield f"{path}.__kwdefaults__", function.__kwdefaults__
    yield from ((f"{path}>{name}", function.__globals__[name]) for name in code.co_names if name in function.__globals__)


def _is_users(value: Any) -> bool:
    return str(getattr(value, "__module__", None)).partition(".")[0] not in _LIBRARIES


def get_state(generator: Any) -> Any:
    """Return the state of a generator, as plain data."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return generator.bit_generator.state if hasattr(generator, "bit_generator") else generator.get_state()


def set_state(generator: Any, state: Any) -> None:
    """Set what `get_state` returned."""
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


class RandomStates:
    """The random states of this rank: torch's, Python's and NumPy's default generators, and those that the user's objects hold."""

    def __init__(self, roots: Mapping[str, Any] | None = None) -> None:
        self.generators = generators_in(roots or {})

    def save(self) -> Any:
        """Return all states."""
        return local_state(), {path: get_state(g) for path, g in self.generators.items()}

    def restore(self, saved: Any) -> None:
        """Set what `save` returned; generators that were not found here are left out."""
        defaults, own = saved
        set_local_state(defaults)
        for path, state in own.items():
            if path in self.generators and type(state) is type(get_state(self.generators[path])):
                set_state(self.generators[path], state)

    def hash(self) -> int:
        """Return a number below 2**32 that is equal on ranks with equal states. Takes some 50 us."""
        crc = zlib.crc32(torch.get_rng_state().numpy())  # type: ignore[arg-type]
        states = [random.getstate(), *map(get_state, self.generators.values())]
        if torch.cuda.is_initialized():
            states.append(torch.cuda.get_rng_state())
        if "numpy" in sys.modules:
            states.append(sys.modules["numpy"].random.get_state())
        for state in states:
            if isinstance(state, Tensor):
                crc = zlib.crc32(state.numpy(), crc)  # type: ignore[arg-type]
            elif isinstance(state, tuple):
                long, *rest = sorted(state, key=lambda part: -len(part) if hasattr(part, "__len__") else 0)
                crc = zlib.crc32(b"%d %r" % (hash(long) if isinstance(long, tuple) else zlib.crc32(long), rest), crc)
            else:
                crc = zlib.crc32(pickle.dumps(state), crc)
        return crc

    def take_over(self, group: dist.ProcessGroup) -> None:
        """Set the states of the first rank of a group. A collective."""
        states = [self.save()]
        dist.broadcast_object_list(states, group=group, group_src=0)
        if group.rank():
            self.restore(states[0])


@contextmanager
def random_states_restored(roots: Iterable[tuple[str, Any]] | Mapping[str, Any]) -> Iterator[RandomStates]:
    """Restore all random states on exit, those of generators that these objects hold as well."""
    states = RandomStates(dict(roots))
    before = states.save()
    try:
        yield states
    finally:
        states.restore(before)
