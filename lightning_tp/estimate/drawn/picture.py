"""What a plan makes of a model, in the order of its forward: each module of a block with its split, and the collectives in between.

The order, the shapes and the collectives are those of a trace (`of_world` in `picture_make.py`); where a model can't be traced, modules
stand in the order in which they were registered, without shapes and collectives (`of_plan`). Names decide nothing: blocks are those of
`find_blocks`, what is alike in structure, splits and collectives is drawn once, and modules without parameters, products or collectives
are left out.

How it looks is `picture_draw.py`'s matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Union

from lightning_tp.estimate.trace.forward_log import Shape

StateKind = Literal["whole", "tokens", "features", "split", "partial", "unknown"]


@dataclass(frozen=True)
class State:
    """An activation: its whole shape, this rank's, and what that means."""

    whole: Shape = ()
    local: Shape = ()
    kind: StateKind = "unknown"

    @property
    def words(self) -> str:
        """For reading."""
        of = _x(self.local)
        if self.kind == "partial":
            return f"{of}, a term of the sum" if of else "a term of the sum"
        if self.kind in ("tokens", "features", "split"):
            what = {"tokens": "tokens split", "features": "features split", "split": "split"}[self.kind]
            return f"{of} of {_x(self.whole)}, {what}"
        return f"{of}, whole" if of and self.kind == "whole" else of


@dataclass(frozen=True)
class Weight:
    """A parameter: its name in the module, its whole shape, the shapes that ranks hold, and the dim that is split."""

    name: str
    whole: Shape
    local: tuple[Shape, ...]
    dim: int | None
    summed: int = 1

    @property
    def words(self) -> str:
        """For reading."""
        return _x(self.whole) if self.dim is None else f"{_x(self.whole)} -> {' | '.join(map(_x, self.local))}"


@dataclass(frozen=True)
class Border:
    """What crosses the ranks at one place.

    Args:
        forward, backward: the kind of collective, "" for none.
        bytes: of the whole tensor.
        times: how many alike.
        reason: of the plan.
        where: the module, if it is not the one beside.
    """

    forward: str
    backward: str
    bytes: int
    times: int = 1
    reason: str = field(default="", compare=False)
    where: str = field(default="", compare=False)

    @property
    def words(self) -> str:
        """For reading, without its size."""
        times = f"{self.times} x " if self.times > 1 else ""
        if not self.forward:
            return f"{times}backward: {self.backward}" if self.backward else "no collective"
        return f"{times}{self.forward}" + (f", backward: {self.backward}" if self.backward else "")


@dataclass(frozen=True)
class Box:
    """A module, modules that are alike, or an operation on activations.

    Args:
        name: in its frame.
        of: class of the module; "" for an operation.
        style: in words, and `cut`: "columns", "rows", "tokens", "whole", "vocabulary", or "" for an operation.
        weights: its own parameters.
        arrives, leaves: its activations.
        reason: of the plan.
        times: how many there are.
        notes: further lines.
        tensor: number of the tensor that it reads; see `Step`.
    """

    name: str
    of: str
    style: str
    cut: str
    weights: tuple[Weight, ...] = ()
    arrives: State = field(default_factory=State, compare=False)
    leaves: State = field(default_factory=State, compare=False)
    reason: str = field(default="", compare=False)
    times: int = 1
    notes: tuple[str, ...] = ()
    tensor: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Frame:
    """A module with others inside, drawn once for `times` that are alike."""

    name: str
    of: str
    rows: tuple[Row, ...]
    times: int = 1
    block: bool = False


@dataclass(frozen=True)
class Side:
    """Boxes that read the same tensor, beside each other."""

    boxes: tuple[Box, ...]


Row = Union[Box, Border, Side, Frame]  # noqa: UP007  # an alias that is read while the classes are made


@dataclass(frozen=True)
class Picture:
    """The whole model, from what comes in to what goes out.

    Args:
        model: its class.
        tp: ranks of the axis.
        rows: in order.
        order: where the order comes from, in words.
        left_out: classes of modules that are not drawn, with their number.
        source: of the plan.
    """

    model: str
    tp: int
    rows: tuple[Row, ...]
    order: str
    left_out: Mapping[str, int]
    source: str

    def boxes(self) -> Iterator[Box]:
        """All boxes, in order."""
        return (row for row in _all(self.rows) if isinstance(row, Box))

    def borders(self) -> Iterator[Border]:
        """All collectives, in order; those in a frame that stands for several once."""
        return (row for row in _all(self.rows) if isinstance(row, Border))


def _all(rows: Iterable[Row]) -> Iterator[Box | Border]:
    """What is drawn, in order."""
    for row in rows:
        if isinstance(row, (Frame, Side)):
            yield from _all(row.rows if isinstance(row, Frame) else row.boxes)
        else:
            yield row


def _x(shape: Shape) -> str:
    return " x ".join(f"{n}" for n in shape)
