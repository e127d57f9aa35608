"""How one parameter is split over the tensor-parallel axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lightning_tp.core.comm.axis import even_shard
from lightning_tp.errors import TPError

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Split:
    """How one parameter lies on the tensor-parallel axis.

    Args:
        dim: the dim that is split; None where every rank holds the whole.
        ranges: for each rank the (start, stop) ranges of `dim` that it holds, in the order in which it holds them. A fused
            weight has one for each part; ranks that share key/value heads have the same.
        sum_over: the gradients of this many neighbouring ranks are shares of one gradient, and are summed: tp for a
            replicated parameter that works on sharded activations, less for shared heads, 1 where each rank has it all.
        sum_rows: the local (start, stop) along `dim` that `sum_over` is about; None means all.
    """

    dim: int | None = None
    ranges: tuple[Ranges, ...] = ()
    sum_over: int = 1
    sum_rows: tuple[int, int] | None = None

    def length(self, rank: int) -> int:
        """How many indices of `dim` this rank holds."""
        return sum(stop - start for start, stop in self.ranges[rank])

    def local_shape(self, shape: Sequence[int], rank: int) -> tuple[int, ...]:
        """The shape that `rank` holds of a parameter of this whole shape."""
        if self.dim is None:
            return tuple(shape)
        return (*shape[: self.dim], self.length(rank), *shape[self.dim + 1 :])

    def take(self, whole: Tensor, rank: int) -> Tensor:
        """This rank's piece of the whole tensor, as a tensor of its own."""
        if self.dim is None:
            return whole.clone()
        pieces = [whole.narrow(self.dim, start, stop - start) for start, stop in self.ranges[rank]]
        if len(pieces) == 1:
            return pieces[0].clone(memory_format=torch.contiguous_format)
        return torch.cat(pieces, self.dim)

    def put(self, whole: Tensor, local: Tensor, rank: int) -> None:
        """Write this rank's piece into its place in the whole tensor: the inverse of `take`."""
        if self.dim is None:
            whole.copy_(local)
            return
        at = 0
        for start, stop in self.ranges[rank]:
            whole.narrow(self.dim, start, stop - start).copy_(local.narrow(self.dim, at, stop - start))
            at += stop - start

    @property
    def is_even_chunks(self) -> bool:
        """Whether it is what torch's `Shard(dim)` means: one range a rank, in order, as `torch.chunk` cuts."""
        if self.dim is None:
            return True
        tp, length = len(self.ranges), max((stop for r in self.ranges for _, stop in r), default=0)
        even = [even_shard(length, r, tp) for r in range(tp)]
        return all(
            len(r) == 1 and (r[0] == (e.start, e.stop) or len(e) == 0 == r[0][1] - r[0][0])
            for r, e in zip(self.ranges, even, strict=True)
        )


def even_split(length: int, dim: int, tp: int) -> Split:
    """Cut a dim of any length in tp shards as even as `torch.chunk` does.

    Example:
        >>> even_split(341, 0, 2).ranges
        (((0, 171),), ((171, 341),))
    """
    return Split(dim, tuple(((r.start, r.stop),) for r in (even_shard(length, rank, tp) for rank in range(tp))))


def head_split(length: int, dim: int, tp: int, heads: int, *, offset: int = 0) -> Split:
    """Cut a dim made of `heads` equal heads: whole heads to each rank, shared by neighbouring ranks where there are fewer than tp.

    The caller has checked that one of heads and tp divides the other.

    Example:
        >>> head_split(32, 0, 4, heads=2)
        Split(dim=0, ranges=(((0, 16),), ((0, 16),), ((16, 32),), ((16, 32),)), sum_over=2, sum_rows=None)
    """
    head = length // heads
    if heads >= tp:
        mine = [(r * heads // tp * head, (r + 1) * heads // tp * head) for r in range(tp)]
    else:
        mine = [(r * heads // tp * head, (r * heads // tp + 1) * head) for r in range(tp)]
    ranges = tuple(((offset + start, offset + stop),) for start, stop in mine)
    return Split(dim, ranges, sum_over=max(1, tp // heads))


def split_of_ranges(ranges: tuple[Ranges, ...], dim: int) -> Split:
    """The split in which each rank has these ranges of `dim`; what several ranks have is summed over them.

    Example:
        >>> split_of_ranges((((0, 2), (4, 5)), ((2, 4), (4, 5))), 0).sum_rows
        (2, 3)
    """
    return _split_of_ranges(tuple(tuple((a, b) for a, b in of) for of in ranges), dim)


@lru_cache(maxsize=1024)  # blocks that repeat have equal ones
def _split_of_ranges(ranges: tuple[Ranges, ...], dim: int) -> Split:
    tp = len(ranges)
    held = [{i for a, b in of for i in range(a, b)} for of in ranges]
    common = set.intersection(*held) if tp > 1 else set()
    if sum(map(len, held)) == len(set.union(*held)) + (tp - 1) * len(common) and common:
        places = [[n for n, i in enumerate(i for a, b in of for i in range(a, b)) if i in common] for of in ranges]
        first = places[0]
        if all(p == first for p in places) and first == list(range(first[0], first[-1] + 1)):
            return Split(dim, ranges, sum_over=tp, sum_rows=(first[0], first[-1] + 1))
        raise TPError(f"Ranks share {len(common)} indices that do not lie at one place on all of them.")
    return Split(dim, ranges)


def check_heads(where: str, heads: int, query_heads: int, length: int, tp: int) -> None:
    """Refuse a tp that would cut through a head.

    Raises:
        TPError: it names the sizes of tp that work.
    """
    if length % heads:
        raise TPError(f"`{where}`: {length} features are not {heads} equal heads. Say how many there are with `heads=`.")
    fits = [t for t in range(1, query_heads + 1) if query_heads % t == 0 and (heads % t == 0 or t % heads == 0)]
    if tp in fits:
        return
    what = f"{heads} heads" if heads == query_heads else f"{heads} key/value heads (of {query_heads} heads)"
    usable = ", ".join(str(t) for t in fits)
    raise TPError(
        f"`{where}`: {what} do not split over tp={tp}"
        + (f": tp is larger than the {query_heads} heads" if tp > query_heads else "")
        + f". Use tp={usable}, or keep this module whole on every rank with `replicate`."
    )


@dataclass(frozen=True)
class Ownership:
    """Which rank has which index of a dim: runs of (rank, length), -1 for all ranks, repeated over the dim.

    Example:
        >>> Ownership(((0, 2), (1, 2))).index(rank=1, length=8).tolist()
        [2, 3, 6, 7]
    """

    runs: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", tuple((r, n) for r, n in self.runs))

    @classmethod
    def of(cls, owner: Tensor) -> Ownership:
        """From the rank of each index."""
        n = owner.numel()
        period = next(p for p in range(1, n + 1) if n % p == 0 and torch.equal(owner[p:], owner[:-p] if p < n else owner[n:]))
        ranks, lengths = torch.unique_consecutive(owner[:period], return_counts=True)
        return cls(tuple(zip(ranks.tolist(), lengths.tolist(), strict=True)))

    @property
    def period(self) -> int:
        """The length that is repeated."""
        return sum(n for _, n in self.runs)

    def count(self, rank: int) -> int:
        """How many of a period this rank has."""
        return sum(n for r, n in self.runs if r in (rank, -1))

    def local(self, length: int, rank: int) -> int:
        """How many of `length` this rank has."""
        return length // self.period * self.count(rank)

    def index(self, rank: int, length: int) -> Tensor:
        """The indices of a dim of this length that the rank has."""
        one = torch.cat([torch.full((n,), r in (rank, -1)) for r, n in self.runs])
        return one.repeat(length // self.period).nonzero().squeeze(1)

    def ranges(self, rank: int) -> tuple[tuple[int, int], ...]:
        """The (start, stop) ranges of one period that the rank has, neighbours joined."""
        spans: list[list[int]] = []
        at = 0
        for r, n in self.runs:
            if r in (rank, -1):
                if spans and spans[-1][1] == at:
                    spans[-1][1] = at + n
                else:
                    spans.append([at, at + n])
            at += n
        return tuple((a, b) for a, b in spans)
