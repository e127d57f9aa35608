"""The picture of a plan as data: each module of a block with its shard, and the collectives in between, in the order of the forward pass.

`picture_from_trace` makes it, `picture_collapse` draws together what is alike, and `picture_render` draws it. Names decide nothing: blocks are those
of `find_blocks`, and modules without parameters, matmuls or collectives are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from lightning_tp.estimate.trace.forward_log import Shape

# of an activation over the ranks; "unknown" where a module was not traced
StateKind = Literal["replicated", "sequence", "features", "sharded", "partial", "unknown"]
STATES: dict[StateKind, str] = {
    "replicated": "replicated",
    "sequence": "sequence-sharded",
    "features": "feature-sharded",
    "sharded": "sharded",
    "partial": "partial sums",
}
# of a weight; "" for an operation, which has none
Cut = Literal["columns", "rows", "sequence", "replicated", ""]


@dataclass(frozen=True)
class State:
    """An activation: its full shape, this rank's, and its state over the ranks."""

    full: Shape = ()
    local: Shape = ()
    kind: StateKind = "unknown"

    @property
    def words(self) -> str:
        """Say it in words."""
        of = f"{sizes(self.local)} of {sizes(self.full)}" if self.kind in ("sequence", "features", "sharded") else sizes(self.local)
        return ", ".join(part for part in (of, STATES.get(self.kind, "")) if part)


@dataclass(frozen=True)
class Weight:
    """A parameter: its name in the module, its full shape, the shapes of its shards, and the dim that is sharded."""

    name: str
    full: Shape
    local: tuple[Shape, ...]
    dim: int | None

    @property
    def words(self) -> str:
        """Say its shapes in words."""
        return sizes(self.full) if self.dim is None else f"{sizes(self.full)} -> {' | '.join(map(sizes, self.local))}"


@dataclass(frozen=True)
class Communication:
    """What crosses the ranks at one place."""

    # forward, backward: the kind of collective, "" for none
    forward: str
    backward: str
    bytes: int  # of the full tensor
    times: int = 1  # how many alike
    reason: str = field(default="", compare=False)  # of the plan
    where: str = field(default="", compare=False)  # the module, if it is not the one beside

    @property
    def words(self) -> str:
        """Say it in words, without its size."""
        kinds = [self.forward, f"backward: {self.backward}" if self.backward else ""]
        words = ", ".join(kind for kind in kinds if kind) or "no collective"
        return (f"{self.where}: " if self.where else "") + (f"{self.times} x " if self.times > 1 else "") + words


@dataclass(frozen=True)
class Box:
    """A module, modules that are alike, or an operation on activations."""

    name: str  # in its frame
    class_name: str  # of the module; "" for an operation
    style: str  # in words
    cut: Cut  # how the largest weight is sharded
    weights: tuple[Weight, ...] = ()  # its own parameters
    # arrives, leaves: its activations
    arrives: State = field(default_factory=State, compare=False)
    leaves: State = field(default_factory=State, compare=False)
    reason: str = field(default="", compare=False)  # of the plan
    times: int = 1  # how many there are
    notes: tuple[str, ...] = ()  # further lines
    tensor: int = field(default=0, compare=False)  # number of the tensor that it reads; see `ForwardEvent`


@dataclass(frozen=True)
class Frame:
    """A module with others inside, drawn once for `times` that are alike."""

    name: str
    class_name: str
    rows: tuple[Row, ...]
    times: int = 1
    block: bool = False


@dataclass(frozen=True)
class SideBySide:
    """Modules that read the same tensor."""

    boxes: tuple[Box, ...]


Row: TypeAlias = "Box | Communication | SideBySide | Frame"


@dataclass(frozen=True)
class Picture:
    """The whole model, from its inputs to its outputs."""

    model: str  # its class
    tp: int  # ranks of the axis
    rows: tuple[Row, ...]  # in order
    order: str  # where the order comes from, in words
    left_out: Mapping[str, int]  # classes of modules that are not drawn, with their number
    source: str  # of the plan

    @property
    def title(self) -> str:
        """Say what is drawn."""
        return f"Sharding plan of {self.model}, tp={self.tp}"

    def boxes(self) -> Iterator[Box]:
        """Walk over all boxes, in order."""
        return (row for row in _leaves(self.rows) if isinstance(row, Box))

    def communications(self) -> Iterator[Communication]:
        """Walk over all collectives, in order; those in a frame that stands for several once."""
        return (row for row in _leaves(self.rows) if isinstance(row, Communication))


def _leaves(rows: Iterable[Row]) -> Iterator[Box | Communication]:
    for row in rows:
        if isinstance(row, (Frame, SideBySide)):
            yield from _leaves(row.rows if isinstance(row, Frame) else row.boxes)
        else:
            yield row


def sizes(shape: Shape) -> str:
    """Format a shape."""
    return " x ".join(map(str, shape))
