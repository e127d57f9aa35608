"""Loaders on a mesh: the ranks of a tensor-parallel group get the same batch, each data-parallel rank gets another one.

| what is given | who reads it | what the other ranks of a tensor-parallel group do |
|---|---|---|
| a DataLoader over indices (map-style) | every rank, with Lightning's sampler over the data-parallel axis | compare each batch, by a fingerprint |
| the same, once batches differ (unseeded augmentation) | the first rank of each group | receive its batches |
| a stream (iterable dataset, generator, any iterable), the same on all ranks | rank 0, and scatters its batches over dp | receive |
| a stream that is sharded over data-parallel ranks already | the first rank of each group | receive |

Which kind of stream it is shows in the first batch, which all ranks read once for that, under equal seeds; a stream that can be read only once
continues after it.

All data-parallel ranks take equally many steps, or FSDP2's collectives would hang. Where some ranks run out of batches earlier, the batches
that others have left are dropped, with a warning. In `predict` nothing is dropped: a rank without a batch runs a dummy step, on an old batch,
and discards its result.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from lightning_tp.core.ops.rng import local_state
from lightning_tp.data.reader import LoaderProxy, Message, Reader, has_state, seeded_alike
from lightning_tp.data.same_batch import fingerprint
from lightning_tp.data.transfer import Ranks as Ranks
from lightning_tp.data.transfer import broadcast_message, for_own_gpu
from lightning_tp.errors import SecondaryError, TPError

COMPARED_WHOLE = 3  # batches at the start of a pass of which every byte is compared
COMPARED_EVERY = 16  # batches of a stream, after which random states are compared
END, FAILED = -1, -2  # instead of a fingerprint: there is no more batch; reading raised an error

DummyStep = Callable[[Any, Any, int], None]


def share_loader(
    loader: Any, ranks: Ranks, *, dummy_step: DummyStep | None = None, limit: int | float = 1.0, where: str = "the loader"
) -> Any:
    """Wrap a loader so that the ranks of a tensor-parallel group get equal batches, and all ranks equally many. A collective.

    Args:
        loader: A DataLoader, or any iterable.
        ranks: The position of this rank in the mesh.
        dummy_step: For `predict`: runs a step on (loader, batch, batch_idx) and discards its result.
        limit: How many batches (int), or which share of them (float), will be asked for; used with `dummy_step` only.
        where: What the loader is called in errors and warnings.

    Returns:
        An iterable with the attributes and the class of the loader. All ranks have to iterate it alike.
    """
    if ranks.dp * ranks.tp == 1:
        return loader
    by_index = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    kind: type[GroupLoader] = GroupMapLoader if by_index else GroupStreamLoader
    if has_state(loader):
        kind = type(kind.__name__, (_Stateful, kind), {})
    return kind(loader, ranks, dummy_step, limit, where)


class GroupLoader(LoaderProxy):
    """A loader that passes for the one it wraps; subclasses say who reads. Arguments as those of `share_loader`."""

    def __init__(self, loader: Any, ranks: Ranks, dummy_step: DummyStep | None, limit: int | float, where: str) -> None:
        super().__init__(loader)
        self.ranks, self.dummy_step, self.limit, self.where = ranks, dummy_step, limit, where
        self.warned: set[str] = set()
        self.size: int | None = None  # batches of a pass on each rank, where that is known

    def __len__(self) -> int:
        if self.size is None:
            raise TypeError(f"{self.where} has no length")
        return self.size

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError

    @property
    def max_steps(self) -> int | None:
        """The number of batches that will be asked for at most, where that is known."""
        if isinstance(self.limit, int):
            return self.limit if self.size is None else min(self.limit, self.size)
        return None if self.size is None else int(self.limit * self.size)

    def warn_once(self, message: str) -> None:
        """Warn on the first rank of the group, once for each message."""
        if self.ranks.tp_rank == 0 and message not in self.warned:
            warnings.warn(f"{self.where}: {message}", stacklevel=2)
        self.warned.add(message)


class _Stateful:
    """The methods by which Lightning recognises a loader that can resume in the middle of a pass."""

    loader: Any

    def state_dict(self) -> Any:
        return self.loader.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.loader.load_state_dict(state)


def _length(loader: Any) -> int:
    """The number of batches, or `END` where that is not known."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return END


class GroupMapLoader(GroupLoader):
    """A DataLoader over indices: every rank reads, until the batches of a group differ; then its first rank reads for all of it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.first_rank_reads = False
        lengths = self.ranks.over_dp(self.ranks.over_tp(_length(self.loader))[0])  # those of the first ranks
        least, most = min(lengths), max(lengths)
        if least == END:
            return
        self.size = least if self.dummy_step is None else most
        if least != most and self.dummy_step is None and self.ranks.dp_rank == 0:
            self.warn_once(
                f"the data-parallel ranks have between {least} and {most} batches. Each runs {least} steps; the remaining batches are "
                "dropped."
            )

    def __iter__(self) -> Iterator[Any]:
        # The iterator is made now, as a DataLoader makes it: that draws random numbers.
        return self._batches(None if self.first_rank_reads else Reader(self.loader, track=False))

    def _batches(self, reader: Reader | None) -> Iterator[Any]:
        if self.first_rank_reads and self.ranks.tp_rank == 0:
            reader = Reader(self.loader, track=self.ranks.tp > 1)
        batch, index = None, 0
        while self.size is None or self.dummy_step is not None or index < self.size:
            message = self._next(reader, index)
            if self.first_rank_reads and self.ranks.tp_rank:
                reader = None  # from now on this rank receives
            if message.kind == "end":
                break
            batch = message.batch
            yield batch
            index += 1
        if self.dummy_step is not None and self.size is not None:
            self._catch_up(self.dummy_step, batch, index)

    def _catch_up(self, dummy_step: DummyStep, batch: Any, index: int) -> None:
        """Run dummy steps up to the number of steps of the longest data-parallel rank."""
        steps = self.max_steps or 0
        if batch is None and index < steps:  # this rank has no item at all
            batch = self.loader.collate_fn([self.loader.dataset[0]])
        for i in range(index, steps):
            dummy_step(self, batch, i)

    def _next(self, reader: Reader | None, index: int) -> Message:
        if self.first_rank_reads:
            return broadcast_message(reader.read() if reader is not None else None, self.ranks)
        assert reader is not None
        message = reader.read()
        if self.ranks.tp == 1 or self._agree(message, index):
            return message.or_raise()
        self.first_rank_reads = reader.track = True
        self.warn_once(
            f"batch {index} differs inside a tensor-parallel group, so from here on the first rank of the group reads for all of it. The "
            "results are right, but each batch is sent. Seed augmentation and samplers alike on all ranks to let each rank read by itself."
        )
        # what other ranks drew for this batch differs as well: they take over all random states
        return broadcast_message(message._replace(rng=local_state()) if self.ranks.tp_rank == 0 else None, self.ranks)

    def _agree(self, message: Message, index: int) -> bool:
        """Compare what the ranks of the group have read, and raise on all of them if reading failed on one. A collective."""
        if message.kind == "batch":
            mine = fingerprint(message.batch, whole=index < COMPARED_WHOLE)
        else:
            mine = END if message.kind == "end" else FAILED
        fingerprints = self.ranks.agree(mine, self.warn_once)
        if FAILED in fingerprints:
            failed = self.ranks.first + fingerprints.index(FAILED)
            text = [message.batch if message.kind == "error" else None]
            dist.broadcast_object_list(text, src=failed, group=self.ranks.tp_group)
            raise message.error or SecondaryError(f"Reading data failed on rank {failed}: {text[0]}.")
        return len(set(fingerprints)) == 1


class GroupStreamLoader(GroupLoader):
    """Any other iterable: read by rank 0 for all ranks, or by the first rank of each tensor-parallel group."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        ranks = self.ranks
        iterator, first = self._first_batch()
        fingerprints = ranks.over_tp(fingerprint(first, whole=True) if first else END)
        group_agrees = len(set(fingerprints)) == 1
        firsts, agreements = ranks.over_dp(fingerprints[0]), ranks.over_dp(int(group_agrees))
        self.scatters = ranks.dp > 1 and all(agreements) and len(set(firsts)) == 1
        self.reads = ranks.tp_rank == 0 and (ranks.dp_rank == 0 or not self.scatters)
        can_read_once = iterator is self.loader
        self.started = (iterator, first) if can_read_once and self.reads else None
        if not group_agrees:
            self.warn_once(
                "the ranks of a tensor-parallel group read different first batches from this iterable; all use those of the first rank. "
                "If it is sharded by the global rank (RANK, torch.distributed.get_rank()), the shards of the other ranks are never read: "
                "shard it by `trainer.strategy.distributed_sampler_kwargs`, or let every rank yield all of it, which is then scattered "
                "over the data-parallel ranks."
            )
        self.size = self._num_steps()

    def _first_batch(self) -> tuple[Iterator[Any], list[Any]]:
        """Read the first batch (at most one) under equal seeds; a loader with a state is put back to its beginning."""
        state = copy.deepcopy(self.loader.state_dict()) if has_state(self.loader) else None
        with seeded_alike():
            iterator = iter(self.loader)
            first = list(islice(iterator, 1))
        if has_state(self.loader) and iterator is not self.loader:
            self.loader.load_state_dict(state)
        return iterator, first

    def _num_steps(self) -> int | None:
        """Return how many steps a pass has, if the loaders know their lengths. A collective."""
        lengths = self.ranks.over_dp(self.ranks.over_tp(_length(self.loader))[0])
        if min(lengths) == END:
            return None
        if self.scatters:
            full, rest = divmod(lengths[0], self.ranks.dp)
            return full + (1 if rest and self.dummy_step is not None else 0)
        return min(lengths) if self.dummy_step is None else max(lengths)

    def __iter__(self) -> Iterator[Any]:
        reader = None
        if self.reads:
            reader = Reader(self.loader, track=self.ranks.tp > 1, started=self.started)
            self.started = None
        last_batch, index = None, 0
        while self.max_steps is None or self.dummy_step is None or index < self.max_steps:
            mine = self._scatter(reader) if self.scatters else self._agree_on_step(reader, last_batch)
            message = broadcast_message(mine, self.ranks)
            if message.kind == "dropped" and self.ranks.dp_rank == 0:
                self.warn_once(
                    f"its last batches are fewer than the {self.ranks.dp} data-parallel ranks and are dropped (after {index} steps)."
                )
            if message.kind in ("dropped", "end"):
                return
            if message.kind == "dummy":
                assert self.dummy_step is not None
                self.dummy_step(self, message.batch, index)
            else:
                last_batch = message.batch
                if index < COMPARED_WHOLE or index % COMPARED_EVERY == 0:
                    self.ranks.agree(0, self.warn_once)
                yield last_batch
            index += 1
            if message.last:
                return

    def _scatter(self, reader: Reader | None) -> Message | None:
        """Let rank 0 read a batch for each data-parallel rank, and return that of this group, on the first rank of it. A collective."""
        ranks = self.ranks
        if ranks.tp_rank:
            return None
        received: list[Any] = [None]
        if reader is None:
            dist.scatter_object_list(received, None, src=ranks.zero, group=ranks.dp_group)
            return received[0]
        messages = [reader.read() for _ in range(ranks.dp)]
        rng = {name: state for message in messages for name, state in (message.rng or {}).items()}
        messages = complete_step(messages, pad=self.dummy_step is not None)
        # the random streams of other groups have not moved
        dist.scatter_object_list(
            received,
            [m._replace(batch=for_own_gpu(m.batch), rng=None, error=None) for m in messages],
            src=ranks.zero,
            group=ranks.dp_group,
        )
        return messages[0]._replace(rng=rng)

    def _agree_on_step(self, reader: Reader | None, last_batch: Any) -> Message | None:
        """Read on the first rank of each group; they continue as long as all have a batch (in `predict`: any). A collective."""
        if reader is None:
            return None
        message = reader.read()
        kinds = self.ranks.over_dp(("batch", "end", "error").index(message.kind))
        if message.kind == "error" or len(set(kinds)) == 1:
            return message
        if 2 in kinds:
            return Message("error", f"the loader of data-parallel rank {kinds.index(2)} raised an error")
        if self.dummy_step is None:
            return Message("dropped", last=True, rng=message.rng)
        if message.kind == "batch":
            return message
        if last_batch is not None:
            return Message("dummy", last_batch)
        no_batch = f"data-parallel rank {self.ranks.dp_rank} has no batch at all, so it cannot run the steps of the other ranks"
        return Message("error", no_batch, error=TPError(f"{self.where}: {no_batch}. Give each data-parallel rank a batch or more."))


def complete_step(messages: list[Message], *, pad: bool) -> list[Message]:
    """Decide what each data-parallel rank does in a step, from what was read for it: an error ends all, and so does the end of the data.

    Where some ranks have a batch and others have none, `pad` lets the latter run a dummy step; otherwise these batches are dropped.

    Example:
        >>> one, end = Message("batch", 1), Message("end")
        >>> [m.kind for m in complete_step([one, end], pad=False)], [m.kind for m in complete_step([one, end], pad=True)]
        (['dropped', 'dropped'], ['batch', 'dummy'])
    """
    failed = next((m for m in messages if m.kind == "error"), None)
    if failed is not None:
        return [failed] * len(messages)
    batches = [m for m in messages if m.kind == "batch"]
    if len(batches) in (0, len(messages)):
        return messages
    if not pad:
        return [Message("dropped", last=True)] * len(messages)
    dummies = [batches[-1]._replace(kind="dummy")] * (len(messages) - len(batches))
    return [m._replace(last=True) for m in (*batches, *dummies)]
