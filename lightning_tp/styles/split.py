"""How one parameter is split over the tensor-parallel axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from lightning_tp.core.comm.axis import even_shard
from lightning_tp.core.comm.state import I, R, S, State
from lightning_tp.errors import TPError

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Split:
    """How one parameter is split over the tensor-parallel axis.

    Args:
        state: `S(dim)` for a parameter of which each rank holds a shard; `I` for a full one whose gradient is equal on all ranks; `R` for a full
            one whose gradient is partial, and summed. None: full, and whether it is `R` or `I` is decided in the first backward pass, by
            comparing its gradients over the ranks.
        ranges: with `S(dim)`, for each rank the (start, stop) ranges of the dim that it holds, in the order in which it holds them. A fused
            weight has one for each part. Ranks that share key/value heads have the same; the gradients of what they share are partial.

    Example:
        >>> Split(S(0), (((0, 2), (4, 5)), ((2, 4), (5, 6)))).local_shape((6, 3), rank=1)
        (3, 3)
    """

    state: State | None = I
    ranges: tuple[Ranges, ...] = ()

    @property
    def dim(self) -> int | None:
        """The dim that is split; None where every rank holds the full parameter."""
        return None if self.state is None else self.state.dim

    def length(self, rank: int) -> int:
        """Return how many indices of `dim` this rank holds."""
        return sum(stop - start for start, stop in self.ranges[rank])

    def local_shape(self, shape: Sequence[int], rank: int) -> tuple[int, ...]:
        """Return the shape of the shard that `rank` holds of a parameter of this full shape."""
        if self.dim is None:
            return tuple(shape)
        return (*shape[: self.dim], self.length(rank), *shape[self.dim + 1 :])

    def take(self, full: Tensor, rank: int) -> Tensor:
        """Return this rank's shard of the full tensor, as a tensor of its own."""
        if self.dim is None:
            return full.clone()
        pieces = [full.narrow(self.dim, start, stop - start) for start, stop in self.ranges[rank]]
        if len(pieces) == 1:
            return pieces[0].clone(memory_format=torch.contiguous_format)
        return torch.cat(pieces, self.dim)

    def put(self, full: Tensor, local: Tensor, rank: int) -> None:
        """Write this rank's shard into its place in the full tensor: the inverse of `take`."""
        if self.dim is None:
            full.copy_(local)
            return
        at = 0
        for start, stop in self.ranges[rank]:
            full.narrow(self.dim, start, stop - start).copy_(local.narrow(self.dim, at, stop - start))
            at += stop - start

    def sum_over(self, tp: int) -> int:
        """Return over how many neighbouring ranks a gradient, or the part `shared_rows` of it, is summed; 1 where it is not partial.

        Raises:
            TPError: if ranks share indices that they do not hold in the same places.
        """
        if self.state == R:
            return tp
        return 1 if self.dim is None else _shared(self.ranges)[0]

    @property
    def shared_rows(self) -> tuple[int, int] | None:
        """The local (start, stop) along `dim` that ranks share, and whose gradient they sum; None means all of it, or nothing."""
        return None if self.dim is None else _shared(self.ranges)[1]

    @property
    def is_even_chunks(self) -> bool:
        """Whether it is what torch's `Shard(dim)` means: one range per rank, in order, as `torch.chunk` cuts."""
        if self.dim is None:
            return True
        tp, length = len(self.ranges), max((stop for r in self.ranges for _, stop in r), default=0)
        even = [even_shard(length, r, tp) for r in range(tp)]
        return all(
            len(r) == 1 and (r[0] == (e.start, e.stop) or len(e) == 0 == r[0][1] - r[0][0])
            for r, e in zip(self.ranges, even, strict=True)
        )


def even_split(length: int, dim: int, tp: int) -> Split:
    """Cut a dim of any length in tp shards, as even as `torch.chunk` does.

    Example:
        >>> even_split(341, 0, 2).ranges
        (((0, 171),), ((171, 341),))
    """
    return Split(S(dim), tuple(((r.start, r.stop),) for r in (even_shard(length, rank, tp) for rank in range(tp))))


def head_split(length: int, dim: int, tp: int, heads: int, *, offset: int = 0) -> Split:
    """Cut a dim made of `heads` equal heads: whole heads to each rank, shared by neighbouring ranks where there are fewer than tp.

    The caller has checked that one of heads and tp divides the other.

    Example:
        >>> split = head_split(32, 0, 4, heads=2)
        >>> split.ranges, split.sum_over(4)
        ((((0, 16),), ((0, 16),), ((16, 32),), ((16, 32),)), 2)
    """
    head = length // heads
    if heads >= tp:
        mine = [(r * heads // tp * head, (r + 1) * heads // tp * head) for r in range(tp)]
    else:
        mine = [(r * heads // tp * head, (r * heads // tp + 1) * head) for r in range(tp)]
    return Split(S(dim), tuple(((offset + start, offset + stop),) for start, stop in mine))


def split_of_ranges(ranges: tuple[Ranges, ...], dim: int) -> Split:
    """Cut a dim so that each rank holds the given ranges of it.

    Example:
        >>> split_of_ranges((((0, 2), (4, 5)), ((2, 4), (4, 5))), 0).shared_rows
        (2, 3)
    """
    return Split(S(dim), tuple(tuple((start, stop) for start, stop in of) for of in ranges))


@lru_cache(maxsize=4096)  # repeated blocks have equal ranges
def _shared(ranges: tuple[Ranges, ...]) -> tuple[int, tuple[int, int] | None]:
    """(how many neighbouring ranks share indices, the local rows in which every rank holds what it shares; None for all)."""
    shared = {span: ranks for span, ranks in _holders(ranges).items() if len(ranks) > 1}
    if not shared:
        return 1, None
    n = len(next(iter(shared.values())))
    groups = {tuple(range(start, start + n)) for start in range(0, len(ranges), n)}
    rows = {_rows_of(own, list(shared)) for own in ranges}
    if set(shared.values()) != groups or len(rows) != 1 or None in rows:
        raise TPError(
            f"Ranks share indices of a weight, but not the same number of neighbouring ranks in the same places: {ranges}. Their gradients "
            "can't be summed in one all-reduce."
        )
    common = rows.pop()
    lengths = {sum(stop - start for start, stop in own) for own in ranges}
    return n, None if lengths == {common and common[1]} and common and common[0] == 0 else common


def _holders(ranges: tuple[Ranges, ...]) -> dict[tuple[int, int], tuple[int, ...]]:
    """Of each (start, stop) between two cuts that any rank makes, the ranks that hold it."""
    cuts = sorted({i for own in ranges for span in own for i in span})
    return {
        (a, b): tuple(rank for rank, own in enumerate(ranges) if any(start <= a and b <= stop for start, stop in own))
        for a, b in pairwise(cuts)
    }


def _rows_of(own: Ranges, shared: list[tuple[int, int]]) -> tuple[int, int] | None:
    """The local rows of a rank that lie in `shared`; None if they do not lie side by side."""
    rows: list[int] = []
    at = 0
    for start, stop in own:
        inside = sorted((max(a, start), min(b, stop)) for a, b in shared if max(a, start) < min(b, stop))
        rows += [row for a, b in inside for row in (at + a - start, at + b - start)]
        at += stop - start
    return (rows[0], rows[-1]) if rows and rows[1:-1:2] == rows[2:-1:2] else None


def check_heads(where: str, heads: int, query_heads: int, length: int, tp: int) -> None:
    """Refuse a tp that would cut through a head: a `TPError` names the sizes of tp that work."""
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
