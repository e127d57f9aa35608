"""What a picture draws once: blocks and modules that are alike, collectives that repeat, modules that read the same tensor."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from lightning_tp.core.modules.blocks import fold, starred
from lightning_tp.estimate.drawn.picture import Box, Communication, Frame, Row, SideBySide, State

MOST_BESIDE = 4


def collapse(rows: Sequence[Row]) -> list[Row]:
    """Draw blocks that are alike once, wherever they are, and other modules that differ in their number where they follow each other.

    Example:
        >>> [row.name for row in collapse([Box(f"experts.{i}", "Linear", "column-wise", "columns") for i in range(4)])]
        ['experts.{0-3}']
    """
    found: list[Row] = []
    names: list[str] = []  # of what the last row stands for
    for row in _collapse_blocks(rows):
        last = found[-1] if found else None
        if isinstance(row, (Box, Frame)) and isinstance(last, type(row)) and _is_next(last, row, names[0]):
            names.append(row.name)
            found[-1] = replace(last, name=fold(names), times=last.times + row.times)
        else:
            found.append(row)
            names = [getattr(row, "name", "")]
    return found


def _is_next(last: Box | Frame, row: Box | Frame, name: str) -> bool:
    """Whether a row is like the last one, whose first member has this name, but for its number; blocks are collapsed already."""
    alike = replace(row, name="", times=1) == replace(last, name="", times=1)
    return alike and "*" in starred(name) and starred(row.name) == starred(name) and not (isinstance(row, Frame) and row.block)


def _collapse_blocks(rows: Sequence[Row]) -> list[Row]:
    groups: dict[tuple[str, tuple[Row, ...]], list[Frame]] = {}
    for row in rows:
        if isinstance(row, Frame) and row.block:
            groups.setdefault((starred(row.name), _ends_and_core(row)[1]), []).append(row)
    found: list[Row] = []
    for row in rows:
        if isinstance(row, Frame) and row.block:
            group = groups.pop((starred(row.name), _ends_and_core(row)[1]), None)
            found.extend(_as_one(group) if group else ())  # all stand where the first one does
        else:
            found.append(row)
    return found


def _as_one(group: Sequence[Frame]) -> list[Row]:
    """Make one frame of blocks that differ at most in the collectives at their ends, with those of the exceptions before and behind it."""
    leads, cores, tails = zip(*map(_ends_and_core, group))
    lead, tail = (Counter(ends).most_common(1)[0][0] for ends in (leads, tails))
    frame = replace(group[0], name=fold([b.name for b in group]), times=sum(b.times for b in group), rows=(*lead, *cores[0], *tail))
    before = [c for ends, b in zip(leads, group) for c in _exception(ends, lead, b.name)]
    behind = [c for ends, b in zip(tails, group) for c in _exception(ends, tail, b.name)]
    return [*before, frame, *behind]


def _ends_and_core(frame: Frame) -> tuple[tuple[Row, ...], tuple[Row, ...], tuple[Row, ...]]:
    """Split the rows of a block: leading collectives, of which the first block may have others, the rest, and trailing collectives."""
    core = [i for i, row in enumerate(frame.rows) if not isinstance(row, Communication)] or [len(frame.rows)]
    return frame.rows[: core[0]], frame.rows[core[0] : core[-1] + 1], frame.rows[core[-1] + 1 :]


def _exception(ends: tuple[Row, ...], usual: tuple[Row, ...], name: str) -> list[Communication]:
    if ends == usual:
        return []
    where = f"{name} only, instead" if usual else f"{name} only"
    return [replace(row, where=where) for row in ends or (Communication("", "", 0),) if isinstance(row, Communication)]


def merge_repeats(rows: Iterable[Row]) -> list[Row]:
    """Join collectives, and operations, that are alike and follow each other."""
    found: list[Row] = []
    for row in rows:
        last = found[-1] if found else None
        if isinstance(row, Communication) and isinstance(last, Communication) and replace(last, times=row.times) == row:
            found[-1] = replace(last, times=last.times + row.times)
        elif (
            isinstance(row, Box) and isinstance(last, Box) and not row.class_name and not last.class_name and last.name == row.name
        ):
            styles = dict.fromkeys(style for box in (last, row) for style in box.style.split("; "))
            found[-1] = replace(last, style="; ".join(styles), times=last.times + row.times)
        else:
            found.append(row)
    return found


def put_side_by_side(rows: Iterable[Row]) -> list[Row]:
    """Put boxes beside each other that read the same tensor, and are of one class and sharded alike."""
    found: list[Row] = []
    for row in rows:
        last = found[-1] if found else None
        boxes = last.boxes if isinstance(last, SideBySide) else (last,) if isinstance(last, Box) else ()
        if (
            isinstance(row, Box)
            and row.tensor
            and 0 < len(boxes) < MOST_BESIDE
            and (boxes[-1].tensor, boxes[-1].cut, boxes[-1].class_name) == (row.tensor, row.cut, row.class_name)
        ):
            found[-1] = SideBySide((*boxes, row))
        else:
            found.append(row)
    return found


def mark_partial_sums(rows: Sequence[Row], tp: int) -> list[Row]:
    """Mark the outputs of boxes that the next collective sums over the ranks."""
    return [
        replace(row, leaves=_summed(row.leaves, behind, tp)) if isinstance(row, Box) and isinstance(behind, Communication) else row
        for row, behind in zip(rows, [*rows[1:], None])
    ]


def _summed(leaves: State, behind: Communication, tp: int) -> State:
    if behind.forward == "all-reduce":
        shape, numels = leaves.local, {math.prod(leaves.local)}
    elif behind.forward == "reduce-scatter":
        shape, numels = (
            leaves.full,
            {math.prod(leaves.full), tp * math.prod(leaves.local)},
        )  # the latter padded, if tp does not divide
    else:
        return leaves
    fits = any(behind.bytes == itemsize * n for itemsize in (1, 2, 4, 8) for n in numels)  # else it is something that a loss sums
    return State(leaves.full, shape, "partial") if shape and fits else leaves
