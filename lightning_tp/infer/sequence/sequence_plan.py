"""What the search for sequence parallelism passes on: streams that are sharded, or why one can't be, and what may be tried in another way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any

from lightning_tp.styles.calls.call import Call

Arg = int | str  # of a module's forward: its position, or its name
CallPlace = tuple[str, str, Any]  # (module, function, place in the code)


class Reduction(IntEnum):
    """Where the partial sums that a region makes are reduced, in the order in which it is tried."""

    OF_STREAM = 0  # where they are made, if they have the shape of the stream
    OF_ANY_WIDTH = 1  # where they are made, whatever their width
    AT_RETURN = 2  # when the region returns
    OPENED = 3  # the modules in it are regions instead


@dataclass
class Region:
    """A module that takes the full sequence, an attention or an MLP, and what is known of it once the tokens were followed."""

    name: str
    reduction: Reduction
    args: tuple[Arg, ...] | None = None  # by which the stream arrives; None before it has run
    reduced: bool | None = None  # whether its partial sums are reduced; None before it has made any
    full_inside: bool = False  # whether it makes partial sums that are not reduced where they stand: of another shape
    other_width: bool = False  # and whether that differs from the stream's in the last dim only

    @property
    def reduces_at_return(self) -> bool:
        """Whether what it returns is a partial sum."""
        return self.reduction is Reduction.AT_RETURN and bool(self.reduced)


@dataclass(frozen=True)
class Alternatives:
    """What is tried in another way than the most usual one, since that failed; numbers in names of regions are stars."""

    reductions: Mapping[str, Reduction] = field(default_factory=dict)  # of regions
    sharded_args: frozenset[tuple[str, Arg]] = frozenset()  # (region, argument) that it takes in shards: a residual
    full_size_reads: frozenset[Any] = frozenset()  # places where code reads the length of the sequence for a full tensor


@dataclass(frozen=True)
class SequencePlan:
    """Streams that are sharded along the sequence, and what that takes."""

    streams: Mapping[tuple[str, ...], Arg | None] = field(default_factory=dict)  # blocks -> the argument of the first
    regions: Mapping[str, Region] = field(default_factory=dict)  # by name
    reduced_layers: Set[str] = frozenset()  # row-wise layers whose partial sums are reduced where they stand
    deferred_layers: Set[str] = frozenset()  # and those whose partial sums are reduced when their region returns
    reduced_calls: Set[CallPlace] = frozenset()  # calls whose partial sums are reduced
    on_shards: Set[tuple[str, str]] = frozenset()  # (parameter, module where it meets the sequence shard)
    on_full: Set[tuple[str, str]] = frozenset()  # (parameter, module where it meets full activations)
    length_reads: Mapping[str, list[Call]] = field(default_factory=dict)  # module -> calls that get the full length

    def __or__(self, other: SequencePlan) -> SequencePlan:
        return SequencePlan(*(getattr(self, f.name) | getattr(other, f.name) for f in fields(self)))


class NotSequenceParallel(Exception):
    """A stream can't be sharded along the sequence: why, in which modules, and what may be had in another way."""

    def __init__(
        self, why: str, modules: Iterable[str] = (), alternatives: Alternatives | None = None, other_width: Iterable[str] = ()
    ) -> None:
        super().__init__(why)
        self.modules, self.other_width = frozenset(modules), frozenset(other_width)
        self.alternatives = alternatives or Alternatives()
