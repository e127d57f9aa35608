"""Record the operations that build a model on the meta device, so that they can be run again for one tensor at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_tp._compat import storage_key, without_torch_function, written_arguments
from lightning_tp.core.modules.playback import DrawPoint, Playback, RecordedOp, Recording, StorageView, Wanted
from lightning_tp.errors import TPError

_TOKEN = 0x7A9E << 40  # a generator whose seed is _TOKEN + k stands after operation k of the tape
_WITHOUT_VALUE = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
_OVERWRITING = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_", "log_normal_"}


class InitTape(TorchDispatchMode):
    """Records, while it is entered, the operations that build a model, with enough about them to run them again in little memory.

    Attributes:
        peak_bytes: the most that the last playback held at once; what was handed out counts until then.
        rng_state: after a complete playback, the state in which an ordinary construction leaves the default generator.

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
        self.rng_state: Tensor | None = None
        self._recording = Recording()
        self._playback = Playback(self._recording)  # the last one
        self._latest: dict[Generator, int] = {}  # the latest recorded draw of each generator
        self._known(torch.default_generator)
        self._end: DrawPoint = self._recording.generators[torch.default_generator]  # where the default generator stands in the end

    @property
    def peak_bytes(self) -> int:
        return self._playback.peak_bytes

    def holds(self, tensor: Tensor) -> bool:
        """Return whether it is recorded how the values of this meta tensor come about."""
        known = self._recording.storages.keys() - self._recording.foreign
        return not nn.parameter.is_lazy(tensor) and storage_key(tensor) in known

    def replay(self, tensors: Sequence[Tensor], *, to_the_end: bool = True) -> Iterator[tuple[list[int], Tensor]]:
        """Yield (positions, value) for each different one of `tensors`, in the order in which they are complete.

        A value is a real CPU tensor and belongs to the caller. Tensors that are the same view of the same memory come once, with all their
        positions. A second call draws the same values again.

        Args:
            tensors: meta tensors that this tape holds.
            to_the_end: also run the draws that no tensor needs, which sets `rng_state`.

        Raises:
            TPError: if one was not made while this tape recorded.
        """
        wanted: Wanted = {}
        for position, tensor in enumerate(tensors):
            if not self.holds(tensor):
                raise TPError(f"tensor {position} of {len(tensors)} was not made inside this `deferred_init()`.")
            wanted.setdefault(storage_key(tensor), {}).setdefault(StorageView.of(tensor), []).append(position)
        return self._replay(wanted, to_the_end)  # a generator of its own: what is wanted is known before it starts

    def _replay(self, wanted: Wanted, to_the_end: bool) -> Iterator[tuple[list[int], Tensor]]:
        self._playback = Playback(self._recording)
        yield from self._playback.run(wanted, self._end if to_the_end else torch.empty(0))
        if to_the_end:
            self.rng_state = self._playback.states[self._end] if isinstance(self._end, int) else self._end

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with without_torch_function():
            return self._run_and_record(func, args, kwargs or {})

    def _run_and_record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        draws, name = _is_random(func), func.overloadpacket.__name__
        leaves = tree_leaves((args, kwargs))
        if not any(map(is_meta, leaves)) and torch.device("meta") not in leaves:
            if draws:  # a real draw, now
                self._set_real_state(self._known(kwargs.get("generator")))
            return func(*args, **kwargs)
        written = [args[i] if i < len(args) else kwargs.get(n) for i, n in written_arguments(func)]
        changes = [t for argument in written for t in tree_leaves(argument)]
        if changes:  # recorded before it runs: `resize_` and `t_` change how their argument looks
            self.record(func, args, kwargs, draws=draws, changes=changes, overwrites=name in _OVERWRITING)
        elif any(isinstance(leaf, Tensor) and not leaf.is_meta for leaf in leaves):  # a real tensor among meta ones
            on_meta = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, (args, kwargs))
            out = func(*on_meta[0], **on_meta[1])
            self.record(func, args, kwargs, draws=draws, makes=tree_leaves(out))
            return out
        out = func(*args, **kwargs)
        storages = self._recording.storages
        if not changes and any(is_meta(t) and storage_key(t) not in storages for t in tree_leaves(out)):  # not just a view
            if name in _WITHOUT_VALUE:
                storages[storage_key(out)] = out.untyped_storage()
            else:
                self.record(func, args, kwargs, draws=draws, makes=tree_leaves(out))
        return out

    def record(
        self, call: Callable[..., Any], args: Any, kwargs: Any, *, draws: bool, makes: Sequence[Any] = (), changes: Sequence[Any] = (),
        overwrites: bool = False,
    ) -> None:  # fmt: skip
        """Append a call, which a playback makes with real tensors instead of the meta tensors in its arguments.

        `draws` says that it draws random numbers, from `kwargs["generator"]` or the default generator; `makes` are its outputs, `changes` those of
        its arguments that it writes to, and `overwrites` says that it does not read them.
        """
        storages = self._recording.storages
        given = [storage_key(leaf) for leaf in tree_leaves((args, kwargs)) if is_meta(leaf)]
        op = RecordedOp(call, tree_map(self._encode, args), tree_map(self._encode, kwargs), torch.get_default_dtype(), set(given))
        for tensor in filter(is_meta, changes):
            key = storage_key(tensor)
            op.writes.add(key)
            if overwrites and given.count(key) == 1:  # unlike `w.copy_(w.T)`
                op.reads.remove(key)
                if tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes():
                    op.overwrites.add(key)
        for position, tensor in enumerate(makes):
            if is_meta(tensor) and storage_key(tensor) not in storages:
                storages[storage_key(tensor)] = tensor.untyped_storage()
                op.makes[position] = StorageView.of(tensor)
        if draws:
            self._record_draw(op, kwargs.get("generator"))
        self._recording.ops.append(op)

    def _encode(self, leaf: Any) -> Any:
        """Return what stands on the tape for an argument: for a meta tensor a view."""
        if is_meta(leaf):
            if storage_key(leaf) not in self._recording.storages:
                self._recording.storages[storage_key(leaf)] = leaf.untyped_storage()
                self._recording.foreign.add(storage_key(leaf))
            return StorageView.of(leaf)
        if isinstance(leaf, Tensor):
            return leaf.detach().clone()  # a copy, for its owner may change it later
        return torch.device("cpu") if leaf == torch.device("meta") else leaf

    def _record_draw(self, op: RecordedOp, generator: Generator | None) -> None:
        """Note where the generator stands, and let it show a token for the state after this operation."""
        op.generator = self._known(generator)
        op.start = self._draw_point(op.generator)
        if isinstance(op.start, int) and op.start != self._latest.get(op.generator):
            self._recording.resumed.add(op.start)
        self._latest[op.generator] = index = len(self._recording.ops)
        op.generator.manual_seed(_TOKEN + index)

    def _known(self, generator: Generator | None) -> Generator:
        """Return this generator, or the default one; its state is remembered when it is met for the first time."""
        generator = torch.default_generator if generator is None else generator
        if generator.device.type != "cpu":
            raise TPError(
                f"`generator=` on {generator.device} inside `deferred_init()`: only draws on the CPU give every rank"
                " the same weights. Pass a CPU generator, or none."
            )
        if generator not in self._recording.generators:
            self._recording.generators[generator] = generator.get_state()
        return generator

    def _draw_point(self, generator: Generator) -> DrawPoint:
        index = generator.initial_seed() - _TOKEN
        return index if 0 <= index < len(self._recording.ops) else generator.get_state()

    def _set_real_state(self, generator: Generator) -> None:
        """Bring a generator from the token that it shows to the state that this stands for."""
        point = self._draw_point(generator)
        if isinstance(point, int):
            playback = Playback(self._recording)
            deque(playback.run({}, point), maxlen=0)
            generator.set_state(playback.states[point])

    def close(self) -> None:
        """Stop recording: give the generators back as they were found, and choose the order of a playback.

        What does not draw runs right after what it is made from, so that a playback of `model.half()` never holds the full model.
        """
        self._end = self._draw_point(torch.default_generator)
        for generator, state in self._recording.generators.items():
            generator.set_state(state)
        after: list[int] = []
        touched: dict[int, int] = {}
        for index, op in enumerate(self._recording.ops):
            before = [touched[key] for key in op.reads | op.writes if key in touched]
            after.append(max(before) if before and op.generator is None else index)
            touched |= dict.fromkeys(op.reads | op.writes | op.made, after[index])
        self._recording.order = sorted(range(len(after)), key=lambda index: (after[index], index))


@cache
def _is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def is_meta(leaf: Any) -> bool:
    """Return whether this is a tensor on the meta device."""
    return isinstance(leaf, Tensor) and leaf.is_meta
