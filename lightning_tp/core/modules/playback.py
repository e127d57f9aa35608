"""Run recorded operations again in little memory: only those that matter, each value handed out and freed as early as possible.

A value is a storage. Parameters, their `.data`, views and tied weights are all views of one storage, so a recorded operation names its
tensors by a storage and a layout. How the operations come to be recorded: `tape.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Generator, Tensor, UntypedStorage
from torch.utils._pytree import tree_leaves, tree_map

from lightning_tp._compat import negative_view, storage_key, without_torch_dispatch, without_torch_function
from lightning_tp.errors import TPError

DrawPoint: TypeAlias = "int | Tensor"  # a point in a random stream: after which recorded operation, or a state of the generator


@dataclass(frozen=True)
class StorageView:
    """A meta tensor as a view of its storage."""

    key: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    conj: bool
    neg: bool

    @classmethod
    def of(cls, t: Tensor) -> StorageView:
        """Describe a tensor."""
        return cls(storage_key(t), t.dtype, tuple(t.size()), t.stride(), int(t.storage_offset()), t.is_conj(), t.is_neg())


PlaybackStep: TypeAlias = "tuple[int | None, set[int], set[int]]"  # operation (or none), storages complete, to free
Wanted: TypeAlias = "dict[int, dict[StorageView, list[int]]]"  # storage -> view of it -> positions in what the caller asked for


@dataclass(eq=False)
class RecordedOp:
    """A call with views for its meta tensors, and what it does to which storage."""

    call: Callable[..., Any]
    args: Any
    kwargs: Any
    default_dtype: torch.dtype  # `torch.ones(2)` takes it
    reads: set[int]
    writes: set[int] = field(default_factory=set)
    overwrites: set[int] = field(default_factory=set)  # those of `writes` of which nothing remains
    makes: dict[int, StorageView] = field(default_factory=dict)  # which output -> a new storage
    generator: Generator | None = None
    start: DrawPoint | None = None  # where its generator stood before

    @property
    def made(self) -> set[int]:
        """The storages that are new."""
        return {view.key for view in self.makes.values()}


@dataclass
class Recording:
    """What a tape has recorded."""

    ops: list[RecordedOp] = field(default_factory=list)
    order: list[int] = field(default_factory=list)  # in which a playback runs them, if it isn't that in which they ran
    storages: dict[int, UntypedStorage] = field(default_factory=dict)  # kept, so that their keys are not used again
    foreign: set[int] = field(default_factory=set)  # storages of which the tape did not see how they were made
    generators: dict[Generator, Tensor] = field(default_factory=dict)  # and their states, as they were found
    resumed: set[int] = field(default_factory=set)  # draws after which their stream continues later, and not with the next draw

    def schedule(self, wanted: set[int], end: DrawPoint) -> deque[PlaybackStep]:
        """Walk back from the storages `wanted` and from the draw `end`: what must run, and when a storage is complete or free.

        Raises:
            TPError: if a value depends on a foreign storage.
        """
        steps: deque[PlaybackStep] = deque()
        live, pending = set(wanted), set(wanted)
        draws = {end} if isinstance(end, int) else set()
        for index in reversed(self.order or range(len(self.ops))):
            if not live and not draws:
                break
            op = self.ops[index]
            matters = not live.isdisjoint(op.writes | op.made)
            if not matters and index not in draws:
                continue
            touched = op.reads | op.writes | op.made
            steps.appendleft((index, touched & pending, (touched & pending) | (touched - live)))
            pending -= touched
            if matters:
                live = (live | op.writes) - op.overwrites - op.made
            live |= op.reads
            draws.discard(index)
            if isinstance(op.start, int):
                draws.add(op.start)
        if live & self.foreign:
            raise TPError(
                "a value is computed from a meta tensor that `deferred_init()` did not see being made, so its contents are unknown: it was"
                " made before the context, or from a Python list in an index. Build the whole model inside the context, and index with"
                " `torch.tensor([...])`."
            )
        if pending:  # made by `torch.empty` and never written
            steps.appendleft((None, pending, pending))
        return steps


class Playback:
    """One run of a recording.

    Attributes:
        peak_bytes: the most that it has held at once; what was handed out counts until then.
        generators: those that stand for the recorded ones.
        states: of the generators, after the draws to which a stream returns.
    """

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.peak_bytes = 0
        self.states: dict[int, Tensor] = {}
        self.generators: dict[Generator | None, Generator] = {generator: Generator() for generator in recording.generators}
        self.generators[torch.default_generator] = torch.default_generator  # most operations take no other
        self._latest: dict[Generator | None, int] = {}  # the draw after which each stands
        self._state = torch.default_generator.get_state()
        self._memory: dict[int, UntypedStorage] = {}

    def run(self, wanted: Wanted, end: DrawPoint) -> Iterator[tuple[list[int], Tensor]]:
        """Run what leads to `wanted` and to the draw `end`; yield (positions, value) of each wanted view when it is complete."""
        steps = self.recording.schedule(set(wanted), end)
        states_to_keep = self.recording.resumed | ({end} if isinstance(end, int) else set())
        while steps:
            ready: list[tuple[list[int], Tensor]] = []
            with self.process():  # left whenever the caller has control
                while steps and not ready:
                    index, complete, free = steps.popleft()
                    if index is not None:
                        self._run_op(index)
                        if index in states_to_keep:
                            self.states[index] = self.generators[self.recording.ops[index].generator].get_state()
                    for key in complete:
                        ready += [(positions, self._tensor(view)) for view, positions in wanted[key].items()]
                    self.peak_bytes = max(self.peak_bytes, sum(storage.nbytes() for storage in self._memory.values()))
                    for key in free:
                        self._memory.pop(key, None)
            while ready:
                yield ready.pop(0)

    def _run_op(self, index: int) -> None:
        op, generators = self.recording.ops[index], self.generators

        def decode(leaf: Any) -> Any:
            if isinstance(leaf, StorageView):
                return self._tensor(leaf, overwritten=leaf.key in op.overwrites)
            return generators[leaf] if isinstance(leaf, Generator) else leaf

        if isinstance(op.start, Tensor):
            generators[op.generator].set_state(op.start)
        elif op.start is not None and op.start != self._latest.get(op.generator):
            generators[op.generator].set_state(self.states[op.start])
        if op.generator is not None:
            self._latest[op.generator] = index
        torch.set_default_dtype(op.default_dtype)
        out = tree_leaves(op.call(*tree_map(decode, op.args), **tree_map(decode, op.kwargs)))
        held = {storage_key(storage) for storage in self._memory.values()}
        for position, view in op.makes.items():
            real = out[position]
            if (real.size(), real.stride(), real.storage_offset()) != (view.size, view.stride, view.offset) or (
                storage_key(real) in held  # the CPU lays it out differently, or makes a view where meta does not
            ):
                real = torch.empty_strided(view.size, view.stride, dtype=view.dtype, device="cpu").copy_(real)
            self._memory[view.key] = real.untyped_storage()

    def _tensor(self, view: StorageView, *, overwritten: bool = False) -> Tensor:
        if view.key not in self._memory:  # made by `torch.empty`: zeros, unless all of it is about to be written
            make = torch.empty if overwritten else torch.zeros
            raw = make(self.recording.storages[view.key].nbytes(), dtype=torch.uint8, device="cpu")
            self._memory[view.key] = raw.untyped_storage()
        tensor = torch.empty(0, dtype=view.dtype, device="cpu")
        tensor.set_(self._memory[view.key], view.offset, view.size, view.stride)
        tensor = tensor.conj() if view.conj else tensor
        return negative_view(tensor) if view.neg else tensor

    @contextmanager
    def process(self) -> Iterator[None]:
        """Give the process random streams and a default dtype of the playback's own, no modes and no autograd, until this exits."""
        state, dtype = torch.default_generator.get_state(), torch.get_default_dtype()
        torch.default_generator.set_state(self._state)
        try:
            with torch.no_grad(), without_torch_function(), without_torch_dispatch():
                yield
        finally:
            self._state = torch.default_generator.get_state()
            torch.default_generator.set_state(state)
            torch.set_default_dtype(dtype)
