"""Loaders of the ranks: one batch for all ranks of a tensor-parallel group, another one for each data-parallel rank.

| what is given | who reads it | what the other ranks of a group do |
|---|---|---|
| a DataLoader over indices (map-style) | every rank, by Lightning's sampler over the data-parallel axis | compare each batch, by a number |
| the same, once batches differ (random augmentation, say) | the first rank of each group | receive its batches |
| a stream (iterable dataset, generator, any iterable), the same on all ranks | rank 0, and deals its batches out over dp | receive |
| a stream that takes its own share on each data-parallel rank | the first rank of each group | receive |

Which stream it is shows in the first batch, which all ranks draw once for that, under equal seeds; a stream that can be read only once
goes on from there. Where one rank reads for others, the random numbers that it has drawn on the way are theirs, too, so that all ranks
of a group stay at the same place of their random streams.

All data-parallel ranks take equally many steps. Where their data ends earlier on some, the batches that others have left are left out,
and a warning says so; in `predict`, nothing is left out: ranks without a batch run a step on an old one, whose result nobody sees, so
that FSDP2's collectives meet.
"""

from __future__ import annotations

import copy
import pickle
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, IterableDataset

from lightning_tp.core.comm.mesh import DATA_PARALLEL, TENSOR_PARALLEL
from lightning_tp.data.same_batch import fingerprint
from lightning_tp.errors import SecondaryError, TPError

LOOKED_AT_WHOLE = 3  # batches of a pass that are compared in every byte
END, FAILED = -1, -2  # in place of a fingerprint: no more batches; reading raised an error

Shadow = Callable[[Any, Any, int], None]


class Ranks:
    """Where this rank stands, and the groups over which batches travel: on CPU, whatever the model's own run on."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        rows = mesh.mesh.tolist()
        self.dp, self.tp = len(rows), len(rows[0])
        self.dp_rank, self.tp_rank = mesh.get_local_rank(DATA_PARALLEL), mesh.get_local_rank(TENSOR_PARALLEL)
        self.zero = rows[0][0]
        self.first = rows[self.dp_rank][0]  # of this tensor-parallel group
        self.dp_group, self.tp_group = mesh.get_group(DATA_PARALLEL), mesh.get_group(TENSOR_PARALLEL)
        if dist.get_backend(self.tp_group) != "gloo":
            self.tp_group, _ = dist.new_subgroups_by_enumeration(rows, backend="gloo")
            self.dp_group, _ = dist.new_subgroups_by_enumeration([list(column) for column in zip(*rows)], backend="gloo")

    def over_tp(self, value: int) -> list[int]:
        """This number on each rank of the tensor-parallel group."""
        return _gather(value, self.tp_group, self.tp)

    def over_dp(self, value: int) -> list[int]:
        """This number on each rank of the data-parallel axis that stands where this one stands in its group."""
        return _gather(value, self.dp_group, self.dp)


def _gather(value: int, group: dist.ProcessGroup, size: int) -> list[int]:
    if size == 1:
        return [value]
    every = torch.empty(size, dtype=torch.int64)
    group._allgather_base(every, torch.tensor([value])).wait()
    return every.tolist()


def share_loader(
    loader: Any, ranks: Ranks, *, shadow: Shadow | None = None, limit: int | float = 1.0, where: str = "the loader"
) -> Any:
    """The same loader, whose batches are equal inside each tensor-parallel group, and equally many on all ranks. A collective.

    Args:
        loader: a DataLoader, or any iterable.
        ranks: this one's place in the mesh.
        shadow: for `predict`: runs a step on (loader, batch, batch_idx), without a result.
        limit: how many batches (int) or what part of them (float) will be asked for; of use with `shadow` only.
        where: what it is called in errors and warnings.

    Returns:
        What looks like the loader (its attributes, its class), and is one iterable for all ranks: all have to iterate it alike.
    """
    if ranks.dp * ranks.tp == 1:
        return loader
    by_index = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    kind: type[_Shared] = _Indexed if by_index else _Stream
    if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        kind = type(kind.__name__, (_WithState, kind), {})
    return kind(loader, ranks, shadow, limit, where)


class _Shared:
    """A loader that is seen through."""

    def __init__(self, loader: Any, ranks: Ranks, shadow: Shadow | None, limit: int | float, where: str) -> None:
        self.loader, self.ranks, self.shadow, self.limit, self.where = loader, ranks, shadow, limit, where
        self.warned: set[str] = set()
        self.size: int | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.loader)

    def __len__(self) -> int:
        if self.size is None:
            raise TypeError(f"{self.where} has no length")
        return self.size

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError

    @property
    def rounds(self) -> int | None:
        """How many batches will be asked for at most, if that is known."""
        if isinstance(self.limit, int):
            return self.limit if self.size is None else min(self.limit, self.size)
        return None if self.size is None else int(self.limit * self.size)

    def say(self, message: str) -> None:
        """Warn once, on the first rank of the group."""
        if self.ranks.tp_rank == 0 and message not in self.warned:
            warnings.warn(f"{self.where}: {message}", stacklevel=2)
        self.warned.add(message)

    def run_shadow(self, batch: Any, index: int) -> None:
        assert self.shadow is not None
        self.shadow(self, batch, index)


class _WithState:
    """What Lightning takes for a loader whose place can be saved."""

    loader: Any

    def state_dict(self) -> Any:
        return self.loader.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.loader.load_state_dict(state)


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


class _Indexed(_Shared):
    """A DataLoader over indices: every rank reads, until the batches of a group differ; then its first rank does."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        length = _length(self.loader)
        own = self.ranks.over_tp(END if length is None else length)[0]  # the first rank's count
        every = self.ranks.over_dp(own)
        self.own = None if own == END else own
        self.shared = False
        if min(every) == END:
            return
        self.size = max(every) if self.shadow is not None else min(every)
        if min(every) != max(every) and self.shadow is None and self.ranks.dp_rank == 0:
            self.say(
                f"the data-parallel ranks have {min(every)} to {max(every)} batches. All take {self.size} steps, the rest is left out."
            )

    def __iter__(self) -> Iterator[Any]:
        if self.shared:
            return self._batches(None)
        return self._batches(_Reader(self.loader, track=False))  # now, as one process does: that draws random numbers

    def _batches(self, reader: _Reader | None) -> Iterator[Any]:
        if self.shared and self.ranks.tp_rank == 0:
            reader = _Reader(self.loader, track=self.ranks.tp > 1)
        batch, index = None, 0
        while self.size is None or self.shadow is not None or index < self.size:
            message = self._next(reader, index)
            if self.shared and self.ranks.tp_rank:
                reader = None  # from now on it receives
            if message.kind == "end":
                break
            batch = message.batch
            yield batch
            index += 1
        if self.shadow is not None and self.size is not None:
            if batch is None and index < (self.rounds or 0):  # this rank has no item at all
                batch = self.loader.collate_fn([self.loader.dataset[0]])
            for i in range(index, self.rounds or 0):
                self.run_shadow(batch, i)

    def _next(self, reader: _Reader | None, index: int) -> _Message:
        if self.shared:
            return broadcast_message(reader.message() if reader is not None else None, self.ranks)
        assert reader is not None
        message = reader.message(track=False)
        if self.ranks.tp == 1:
            return message.or_raise()
        if message.kind == "batch":
            mine = fingerprint(message.batch, whole=index < LOOKED_AT_WHOLE)
        else:
            mine = END if message.kind == "end" else FAILED
        every = self.ranks.over_tp(mine)
        if FAILED in every:  # on this rank or on another: it is not passed over
            said = [message.batch if message.kind == "error" else None]
            failed = every.index(FAILED)
            dist.broadcast_object_list(said, src=self.ranks.first + failed, group=self.ranks.tp_group)
            raise message.error or SecondaryError(f"Reading data failed on rank {self.ranks.first + failed}: {said[0]}.")
        if len(set(every)) == 1:
            return message.or_raise()
        self.shared = True
        self.say(
            f"batch {index} differs inside a tensor-parallel group, so its first rank reads for all of it from here on. That is right, and "
            "costs sending each batch. With random numbers that are seeded alike on all ranks, each could read by itself."
        )
        return broadcast_message(message._replace(rng=_random_states()) if self.ranks.tp_rank == 0 else None, self.ranks)


class _Stream(_Shared):
    """Any other iterable: read by one rank of each group, or by one for all."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.drawn: tuple[Iterator[Any], list[Any]] | None = None  # of a stream that can be read only once
        has_state = hasattr(self.loader, "state_dict") and hasattr(self.loader, "load_state_dict")
        state = copy.deepcopy(self.loader.state_dict()) if has_state else None
        with _seeded_alike():
            iterator = iter(self.loader)
            first = list(_take(iterator, 1))
        if has_state and iterator is not self.loader:  # its place would be behind what was drawn here
            self.loader.load_state_dict(state)
        once = iterator is self.loader
        every = self.ranks.over_tp(fingerprint(first, whole=True) if first else END)
        like_first = len(set(every)) == 1
        over_dp = self.ranks.over_dp(every[0])
        agree = self.ranks.over_dp(int(like_first))
        self.dealt = self.ranks.dp > 1 and all(agree) and len(set(over_dp)) == 1
        self.reads = self.ranks.tp_rank == 0 and (self.ranks.dp_rank == 0 or not self.dealt)
        if once and self.reads:
            self.drawn = (iterator, first)
        if not like_first:
            self.say(
                "the ranks of a tensor-parallel group find different first batches in this iterable; those of the first rank are used by "
                "all of it. If it takes its share by the global rank (RANK, torch.distributed.get_rank()), the share of the others is never "
                "read: let it take its share by `trainer.strategy.distributed_sampler_kwargs`, or all of it, and it is dealt out."
            )
        length = _length(self.loader)
        lengths = self.ranks.over_dp(self.ranks.over_tp(END if length is None else length)[0])
        if min(lengths) != END:
            whole, rest = divmod(lengths[0], self.ranks.dp)
            if self.dealt:
                self.size = whole + (1 if rest and self.shadow is not None else 0)
            else:
                self.size = max(lengths) if self.shadow is not None else min(lengths)

    def __iter__(self) -> Iterator[Any]:
        reader = None
        if self.reads:
            reader = _Reader(self.loader, track=self.ranks.tp > 1, drawn=self.drawn)
            self.drawn = None
        last_batch, index = None, 0
        while self.rounds is None or self.shadow is None or index < self.rounds:
            mine = self._deal(reader) if self.dealt else self._agree(reader, last_batch)
            message = broadcast_message(mine, self.ranks)
            if message.kind == "left out":
                if self.ranks.dp_rank == 0:
                    self.say(
                        f"its batches do not make up a last step of all {self.ranks.dp} data-parallel ranks; they are left out ({index} steps)."
                    )
                return
            if message.kind == "end":
                return
            if message.kind == "shadow":
                self.run_shadow(message.batch, index)
            else:
                last_batch = message.batch
                yield last_batch
            index += 1
            if message.last:
                return

    def _deal(self, reader: _Reader | None) -> _Message | None:
        """Rank 0 reads a batch for each data-parallel rank; the first rank of each group gets its own."""
        if self.ranks.tp_rank:
            return None
        dealt: list[_Message] = []
        if reader is not None:
            dealt = [reader.message(track=self.ranks.tp > 1) for _ in range(self.ranks.dp)]
            rng = {k: v for m in dealt for k, v in (m.rng or {}).items()}
            failed = next((m for m in dealt if m.kind == "error"), None)
            batches = [m for m in dealt if m.kind == "batch"]
            if failed is not None:
                dealt = [failed] * self.ranks.dp
            elif batches and len(batches) < self.ranks.dp:
                filler = _Message("left out") if self.shadow is None else batches[-1]._replace(kind="shadow")
                if self.shadow is None:
                    dealt = [filler] * self.ranks.dp
                else:
                    dealt = [*batches, *[filler] * (self.ranks.dp - len(batches))]
                dealt = [m._replace(last=True) for m in dealt]
            own = dealt[0]._replace(rng=rng)
            dealt = [m._replace(rng=None, error=None) for m in dealt]  # the others' streams have not moved
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, dealt if reader is not None else None, src=self.ranks.zero, group=self.ranks.dp_group)
        return own if reader is not None else mine[0]

    def _agree(self, reader: _Reader | None, last_batch: Any) -> _Message | None:
        """Each group's first rank reads; they go on as long as all have a batch (in `predict`: any)."""
        if reader is None:
            return None
        message = reader.message(track=self.ranks.tp > 1)
        kinds = self.ranks.over_dp(("batch", "end", "error").index(message.kind))
        if message.kind == "error" or set(kinds) == {kinds[0]}:
            return message
        if 2 in kinds:
            return _Message("error", f"the loader of data-parallel rank {kinds.index(2)} raised an error")
        if self.shadow is None:
            return _Message("left out", last=True, rng=message.rng)
        if message.kind == "end":
            if last_batch is None:
                none = f"data-parallel rank {self.ranks.dp_rank} has no batch at all, so it can't take part"
                return _Message("error", none, error=TPError(f"{self.where}: {none}."))
            return _Message("shadow", last_batch)
        return message


def _take(iterator: Iterator[Any], count: int) -> Iterator[Any]:
    for _ in range(count):
        try:
            yield next(iterator)
        except StopIteration:
            return


# ------------------------------------------------------------------------------------------------------ reading, sending


class _Message(NamedTuple):
    """What one rank says to the others of its group."""

    kind: str  # batch, end, shadow (run a step for nobody), left out, error
    batch: Any = None  # of an error: what it was
    last: bool = False  # nothing comes after it, and nobody asks
    rng: dict[str, Any] | None = None  # random states that reading has changed
    error: Exception | None = None  # stays where it was raised

    def or_raise(self) -> _Message:
        if self.kind == "error":
            raise self.error or SecondaryError(f"Reading data failed on the rank that reads for this one: {self.batch}.")
        return self


class _Reader:
    """Draws batches and, where others only receive them, keeps track of the random numbers that this takes."""

    def __init__(self, loader: Any, *, track: bool, drawn: tuple[Iterator[Any], list[Any]] | None = None) -> None:
        self._before = _random_states() if track else None
        self.iterator, self.drawn = (iter(loader), []) if drawn is None else drawn

    def message(self, *, track: bool = True) -> _Message:
        before = (self._before or _random_states()) if track else None
        self._before = None
        kind, batch, failed = "batch", None, None
        try:
            batch = self.drawn.pop(0) if self.drawn else next(self.iterator)
        except StopIteration:
            kind = "end"
        except Exception as error:
            kind, batch, failed = "error", f"{type(error).__name__}: {error}", error
        rng = None if before is None else {k: v for k, v in _random_states().items() if not _equal(v, before.get(k))}
        return _Message(kind, batch, rng=rng, error=failed)


class _Slot(NamedTuple):
    """The place of a tensor that travels by itself."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    pinned: bool
    num_bytes: int


def broadcast_message(message: _Message | None, ranks: Ranks) -> _Message:
    """What the first rank of the tensor-parallel group says, on all ranks of it; batches keep their devices. A collective.

    Raises:
        Exception: on the first rank, what reading raised there; on the others `SecondaryError`, a TPError, with its words.
    """
    if ranks.tp == 1:
        assert message is not None
        return message.or_raise()
    if ranks.tp_rank == 0:
        assert message is not None
        tensors: list[Tensor] = []
        header: list[Any] = [message._replace(batch=_taken_out(message.batch, tensors), error=None)]
        try:
            dist.broadcast_object_list(header, src=ranks.first, group=ranks.tp_group)
        except (TypeError, AttributeError, pickle.PicklingError) as error:  # before anything was sent
            message = _Message("error", f"a batch can't be pickled: {error}", error=TPError(_NO_PICKLE.format(error)))
            dist.broadcast_object_list([message._replace(error=None)], src=ranks.first, group=ranks.tp_group)
            message.or_raise()
        if tensors:
            dist.broadcast(torch.cat(tensors), src=ranks.first, group=ranks.tp_group)
        return message.or_raise()
    received: list[Any] = [None]
    dist.broadcast_object_list(received, src=ranks.first, group=ranks.tp_group)
    message = received[0]
    assert message is not None
    _set_random_states(message.rng or {})
    slots = [x for x in tree_leaves(message.batch, is_leaf=_is_slot) if _is_slot(x)]
    if total := sum(slot.num_bytes for slot in slots):
        flat = torch.empty(total, dtype=torch.uint8)
        dist.broadcast(flat, src=ranks.first, group=ranks.tp_group)
        pieces = iter(flat.split([slot.num_bytes for slot in slots]))
        batch = tree_map(lambda x: _filled(x, next(pieces)) if _is_slot(x) else x, message.batch, is_leaf=_is_slot)
    else:
        batch = tree_map(
            lambda x: _filled(x, torch.empty(0, dtype=torch.uint8)) if _is_slot(x) else x, message.batch, is_leaf=_is_slot
        )
    return message._replace(batch=batch).or_raise()


_NO_PICKLE = (
    "A batch has to be sent to the other ranks of a tensor-parallel group, and can't be pickled ({}). Let the loader give tensors, numbers, "
    "strings, and containers or objects of them."
)


def _taken_out(batch: Any, tensors: list[Tensor]) -> Any:
    """The batch with slots for its tensors, whose bytes go into `tensors`. Tensors of odd kinds stay where they are, and are pickled."""

    def take(x: Any) -> Any:
        if type(x) is not Tensor or x.layout != torch.strided or x.is_quantized:
            return x
        raw = x.detach().cpu().contiguous().reshape(-1)
        raw = raw.view(torch.uint8) if raw.numel() else raw.to(torch.uint8)
        if raw.numel():
            tensors.append(raw)
        return _Slot(tuple(x.shape), x.dtype, x.device, x.is_pinned() if torch.cuda.is_available() else False, raw.numel())

    return tree_map(take, batch)


def _is_slot(x: Any) -> bool:
    return isinstance(x, _Slot)


def _filled(slot: _Slot, raw: Tensor) -> Tensor:
    if not slot.num_bytes:
        return torch.empty(slot.shape, dtype=slot.dtype, device=slot.device.type)
    t = raw.clone().view(slot.dtype).view(slot.shape)  # its own memory, aligned
    if slot.pinned:
        return t.pin_memory()
    return t if slot.device.type == "cpu" else t.to(slot.device.type)


# ------------------------------------------------------------------------------------------------------- random numbers


def _random_states() -> dict[str, Any]:
    """The generators that a dataset draws from by default; numpy's if somebody has imported it."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if (numpy := sys.modules.get("numpy")) is not None:
        states["numpy"] = numpy.random.get_state(legacy=False)
    return states


def _set_random_states(states: dict[str, Any]) -> None:
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "python" in states:
        random.setstate(states["python"])
    if "numpy" in states:
        import numpy

        numpy.random.set_state(states["numpy"])


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and b is not None:  # numpy's
        return bool(a["state"]["pos"] == b["state"]["pos"] and (a["state"]["key"] == b["state"]["key"]).all())
    return bool(a == b)


@contextmanager
def _seeded_alike() -> Iterator[None]:
    """Equal random numbers on all ranks, whatever they had before; afterwards as before."""
    before = _random_states()
    torch.default_generator.manual_seed(0)
    random.seed(0)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(0)
    try:
        yield
    finally:
        _set_random_states(before)
