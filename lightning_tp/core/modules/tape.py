"""Record operators on the meta device and replay them for one tensor at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Generator, Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_tp.errors import TPError

_TOKEN = 0x7A9E << 40  # a generator whose seed is _TOKEN + k stands after operation k of the tape


_NO_VALUE = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}


_OVERWRITE = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_", "log_normal_"}


_Key: TypeAlias = int  # the address of a meta tensor's storage; the tape keeps it alive, so none is used twice


_Start: TypeAlias = "int | Tensor"  # where a generator stands: after which draw of the tape, or a real state


@dataclass(frozen=True)
class _View:
    """A meta tensor as a way of looking at its storage."""

    key: _Key
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    conj: bool
    neg: bool

    @classmethod
    def of(cls, t: Tensor) -> _View:
        return cls(_key(t), t.dtype, tuple(t.size()), t.stride(), int(t.storage_offset()), t.is_conj(), t.is_neg())


@dataclass(eq=False)
class _Op:
    """One entry of the tape: a call with views for its meta tensors, and what it does to which storage."""

    call: Callable[..., Any]
    args: Any
    kwargs: Any
    default_dtype: torch.dtype  # `torch.ones(2)` takes it
    reads: set[_Key]
    writes: set[_Key] = field(default_factory=set)
    wipes: set[_Key] = field(default_factory=set)  # those of `writes` of which nothing remains
    makes: dict[int, _View] = field(default_factory=dict)  # which output -> a new storage
    generator: Generator | None = None
    start: _Start | None = None

    @property
    def made(self) -> set[_Key]:
        return {view.key for view in self.makes.values()}


class TapeEntry(NamedTuple):
    """A step of a playback: which operation, the wanted storages that are complete after it, those to free after it."""

    op: int
    complete: set[_Key]
    free: set[_Key]


class InitTape(TorchDispatchMode):
    """The operations that build a model, with enough about them to run them again in little memory.

    Attributes:
        peak_bytes: the most that the last playback held at once; what was handed out counts until then.
        rng_state: after a complete playback, the state in which an ordinary construction leaves the global generator.

    Example:
        >>> from lightning_tp.core.modules.deferred_init import deferred_init
        >>> with deferred_init() as tape:
        ...     weight = nn.Parameter(torch.empty(2, 3))
        ...     nn.init.ones_(weight).is_meta
        True
        >>> [(positions, value.tolist()) for positions, value in tape.replay([weight])]
        [([0], [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])]
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self.rng_state: Tensor | None = None
        self._ops: list[_Op] = []
        self._order: list[int] = []  # in which a playback runs them
        self._storages: dict[_Key, UntypedStorage] = {}
        self._foreign: set[_Key] = set()  # storages that the tape did not see being made
        self._found: dict[Generator, Tensor] = {}  # generators, as the context found them
        self._latest: dict[Generator, int] = {}  # their latest draw on the tape
        self._resumed: set[int] = set()  # draws after which a stream goes on, but not at once
        self._meet(torch.default_generator)
        self._end: _Start = self._found[torch.default_generator]  # where the global generator stands in the end

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tape knows how the values of this meta tensor come about."""
        return not nn.parameter.is_lazy(tensor) and _key(tensor) in self._storages.keys() - self._foreign

    # ---- recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self._see(func, args, kwargs or {})

    def _see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        draws, written = _facts(func)
        leaves = _leaves((args, kwargs))
        if not any(map(_is_meta, leaves)) and torch.device("meta") not in leaves:
            if draws:  # a real draw, now
                self._settle(self._meet(kwargs.get("generator")))
            return func(*args, **kwargs)
        changes = [t for i, name in written for t in _leaves(args[i] if i < len(args) else kwargs.get(name))]
        if changes:  # noted before it runs: `resize_` and `t_` change how their argument looks
            self._note(func, args, kwargs, draws=draws, changes=changes, overwrites=_name(func) in _OVERWRITE)
        elif any(isinstance(leaf, Tensor) and not leaf.is_meta for leaf in leaves):  # a real tensor among meta ones
            on_meta = _map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, (args, kwargs))
            out = func(*on_meta[0], **on_meta[1])
            self._note(func, args, kwargs, draws=draws, makes=_leaves(out))
            return out
        out = func(*args, **kwargs)
        if not changes and any(_is_meta(t) and _key(t) not in self._storages for t in _leaves(out)):  # not just a view
            if _name(func) in _NO_VALUE:
                self._storages[_key(out)] = out.untyped_storage()
            else:
                self._note(func, args, kwargs, draws=draws, makes=_leaves(out))
        return out

    def _note(
        self,
        call: Callable[..., Any],
        args: Any,
        kwargs: Any,
        *,
        draws: bool,
        makes: Sequence[Any] = (),
        changes: Sequence[Any] = (),
        overwrites: bool = False,
    ) -> None:
        def encode(leaf: Any) -> Any:
            if _is_meta(leaf):
                if _key(leaf) not in self._storages:
                    self._storages[_key(leaf)] = leaf.untyped_storage()
                    self._foreign.add(_key(leaf))
                return _View.of(leaf)
            if isinstance(leaf, Tensor):
                return leaf.detach().clone()  # a copy, for its owner may change it later
            return torch.device("cpu") if leaf == torch.device("meta") else leaf

        given = [_key(leaf) for leaf in _leaves((args, kwargs)) if _is_meta(leaf)]
        op = _Op(call, _map(encode, args), _map(encode, kwargs), torch.get_default_dtype(), set(given))
        for tensor in filter(_is_meta, changes):
            op.writes.add(_key(tensor))
            if overwrites and given.count(_key(tensor)) == 1:  # unlike `w.copy_(w.T)`
                op.reads.remove(_key(tensor))
                if tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes():
                    op.wipes.add(_key(tensor))
        for position, tensor in enumerate(makes):
            if _is_meta(tensor) and _key(tensor) not in self._storages:
                self._storages[_key(tensor)] = tensor.untyped_storage()
                op.makes[position] = _View.of(tensor)
        if draws:
            op.generator = self._meet(kwargs.get("generator"))
            op.start = self._where(op.generator)
            if isinstance(op.start, int) and op.start != self._latest.get(op.generator):
                self._resumed.add(op.start)
            self._latest[op.generator] = len(self._ops)
            op.generator.manual_seed(_TOKEN + len(self._ops))
        self._ops.append(op)

    def _meet(self, generator: Generator | None) -> Generator:
        generator = torch.default_generator if generator is None else generator
        if generator.device.type != "cpu":
            raise TPError(
                f"`generator=` on {generator.device} inside `deferred_init()`: only draws on the CPU give every rank"
                " the same weights. Pass a CPU generator, or none."
            )
        if generator not in self._found:
            self._found[generator] = generator.get_state()
        return generator

    def _where(self, generator: Generator) -> _Start:
        index = generator.initial_seed() - _TOKEN
        return index if 0 <= index < len(self._ops) else generator.get_state()

    def _settle(self, generator: Generator) -> None:
        """Bring a generator from the token that it shows to the state that this stands for."""
        where = self._where(generator)
        if isinstance(where, int):
            states: dict[int, Tensor] = {}
            deque(self._play({}, where, states), maxlen=0)
            generator.set_state(states[where])

    def _close(self) -> None:
        self._end = self._where(torch.default_generator)
        for generator, state in self._found.items():
            generator.set_state(state)
        # What does not draw is to run right after what it is made from, so that `model.half()` holds no whole model.
        after: list[int] = []
        touched: dict[_Key, int] = {}
        for index, op in enumerate(self._ops):
            before = [touched[key] for key in op.reads | op.writes if key in touched]
            after.append(max(before) if before and op.generator is None else index)
            touched |= dict.fromkeys(op.reads | op.writes | op.made, after[index])
        self._order = sorted(range(len(self._ops)), key=lambda index: (after[index], index))

    # ---- playing back

    def replay(self, tensors: Sequence[Tensor], *, to_the_end: bool = True) -> Iterator[tuple[list[int], Tensor]]:
        """Yield ``(positions, value)`` for each different one of `tensors`, in the order in which they are complete.

        A value is a real CPU tensor and belongs to the caller. Tensors that look at the same memory in the same way
        come once, with all their positions. A second call draws the same values again. Without `to_the_end` nothing runs
        but what leads to them, and `rng_state` is not set.
        """
        wanted: dict[_Key, dict[_View, list[int]]] = {}
        for position, tensor in enumerate(tensors):
            if not self.holds(tensor):
                raise TPError(f"tensor {position} of {len(tensors)} was not made inside this `deferred_init()`.")
            wanted.setdefault(_key(tensor), {}).setdefault(_View.of(tensor), []).append(position)

        def play() -> Iterator[tuple[list[int], Tensor]]:  # apart, so that what is wanted is settled before it starts
            states: dict[int, Tensor] = {}
            if not to_the_end:
                yield from self._play(wanted, torch.empty(0), states)
                return
            yield from self._play(wanted, self._end, states)
            self.rng_state = states[self._end] if isinstance(self._end, int) else self._end

        return play()

    def _plan(self, wanted: set[_Key], end: _Start) -> deque[TapeEntry]:
        """Walk back from `wanted` and from the draw `end`: what must run, and when a storage is complete or free."""
        steps: deque[TapeEntry] = deque()
        live, pending = set(wanted), set(wanted)
        draws = {end} if isinstance(end, int) else set()
        for index in reversed(self._order or range(len(self._ops))):
            if not live and not draws:
                break
            op = self._ops[index]
            matters = not live.isdisjoint(op.writes | op.made)
            if not matters and index not in draws:
                continue
            touched = op.reads | op.writes | op.made
            steps.appendleft(TapeEntry(index, touched & pending, (touched & pending) | (touched - live)))
            pending -= touched
            if matters:
                live = (live | op.writes) - op.wipes - op.made
            live |= op.reads
            draws.discard(index)
            if isinstance(op.start, int):
                draws.add(op.start)
        if live & self._foreign:
            raise TPError(
                "a value is computed from a meta tensor that `deferred_init()` did not see being made, so its contents"
                " are unknown: it was made before the context, or from a Python list in an index. Build the whole model"
                " inside the context, and index with `torch.tensor([...])`."
            )
        if pending:  # made by `torch.empty` and never written
            steps.appendleft(TapeEntry(-1, pending, pending))
        return steps

    def _play(
        self, wanted: dict[_Key, dict[_View, list[int]]], end: _Start, states: dict[int, Tensor]
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Run what leads to `wanted` and to the draw `end`; note in `states` how the generators stand after `end`."""
        steps = self._plan(set(wanted), end)
        keep = self._resumed | ({end} if isinstance(end, int) else set())
        memory: dict[_Key, UntypedStorage] = {}
        world, self.peak_bytes = PlaybackState(self._found), 0
        while steps:
            ready: list[tuple[list[int], Tensor]] = []
            with world:  # left whenever the caller has control
                while steps and not ready:
                    index, complete, free = steps.popleft()
                    if index >= 0:
                        self._run(index, memory, world, states)
                    if index in keep:
                        states[index] = world.generators[self._ops[index].generator].get_state()
                    for key in complete:
                        ready += [(positions, self._look(view, memory)) for view, positions in wanted[key].items()]
                    self.peak_bytes = max(self.peak_bytes, sum(storage.nbytes() for storage in memory.values()))
                    for key in free:
                        memory.pop(key, None)
            while ready:
                yield ready.pop(0)

    def _run(self, index: int, memory: dict[_Key, UntypedStorage], world: PlaybackState, states: dict[int, Tensor]) -> None:
        op = self._ops[index]

        def decode(leaf: Any) -> Any:
            if isinstance(leaf, _View):
                return self._look(leaf, memory, wiped=leaf.key in op.wipes)
            return world.generators[leaf] if isinstance(leaf, Generator) else leaf

        if isinstance(op.start, Tensor):
            world.generators[op.generator].set_state(op.start)
        elif op.start is not None and op.start != world.latest.get(op.generator):
            world.generators[op.generator].set_state(states[op.start])
        if op.generator is not None:
            world.latest[op.generator] = index
        torch.set_default_dtype(op.default_dtype)
        out = _leaves(op.call(*_map(decode, op.args), **_map(decode, op.kwargs)))
        held = {storage._cdata for storage in memory.values()}
        for position, view in op.makes.items():
            real = out[position]
            if (real.size(), real.stride(), real.storage_offset()) != (view.size, view.stride, view.offset) or (
                _key(real) in held  # the CPU lays it out differently, or makes a view where meta does not
            ):
                real = torch.empty_strided(view.size, view.stride, dtype=view.dtype, device="cpu").copy_(real)
            memory[view.key] = real.untyped_storage()

    def _look(self, view: _View, memory: dict[_Key, UntypedStorage], *, wiped: bool = False) -> Tensor:
        if view.key not in memory:  # made by `torch.empty`: zeros, unless all of it is about to be written
            make = torch.empty if wiped else torch.zeros
            raw = make(self._storages[view.key].nbytes(), dtype=torch.uint8, device="cpu")
            memory[view.key] = raw.untyped_storage()
        tensor = torch.empty(0, dtype=view.dtype, device="cpu")
        tensor.set_(memory[view.key], view.offset, view.size, view.stride)
        tensor = tensor.conj() if view.conj else tensor
        return torch._neg_view(tensor) if view.neg else tensor


class PlaybackState:
    """The process as a playback needs it: its own random streams and default dtype, no modes, no autograd."""

    def __init__(self, generators: dict[Generator, Tensor]) -> None:
        self.generators: dict[Generator | None, Generator] = {generator: Generator() for generator in generators}
        self.generators[torch.default_generator] = torch.default_generator  # most operations take no other
        self.latest: dict[Generator | None, int] = {}  # the draw after which each stands
        self._state = torch.default_generator.get_state()

    def __enter__(self) -> None:
        self._theirs = torch.default_generator.get_state(), torch.get_default_dtype()
        torch.default_generator.set_state(self._state)
        self._guards = ExitStack()
        for guard in (torch.no_grad(), torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch()):
            self._guards.enter_context(guard)

    def __exit__(self, *_: object) -> None:
        self._guards.close()
        self._state = torch.default_generator.get_state()
        torch.default_generator.set_state(self._theirs[0])
        torch.set_default_dtype(self._theirs[1])


@cache
def _facts(func: Any) -> tuple[bool, list[tuple[int, str]]]:
    """Whether an operation draws, and which of its arguments it changes."""
    arguments = list(enumerate(func._schema.arguments))
    written = [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return torch.Tag.nondeterministic_seeded in func.tags, written


def _name(func: Any) -> str:
    return func.overloadpacket.__name__


def _key(tensor: Tensor) -> _Key:
    return tensor.untyped_storage()._cdata


def _is_meta(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_meta


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_map(function, item) for item in value]
    if isinstance(value, dict):
        return {key: _map(function, item) for key, item in value.items()}
    return function(value)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple, dict)):
        return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in _leaves(item)]
    return [value]
