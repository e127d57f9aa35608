"""What is drawn once: blocks and modules that are alike, collectives that repeat, modules that read the same tensor."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from lightning_tp.core.modules.blocks import fold, starred
from lightning_tp.estimate.drawn.picture import Border, Box, Frame, Row, Side, State


def alike(rows: list[Row]) -> list[Row]:
    """Blocks that are alike once, wherever they are; other modules that differ in their number, where they follow each other."""
    rows = _fold_blocks(rows)
    found: list[Row] = []
    members: list[str] = []
    for row in rows:
        last = found[-1] if found else None
        if (
            isinstance(row, (Box, Frame))
            and isinstance(last, type(row))
            and not getattr(row, "block", False)
            and starred(row.name) == starred(members[0])
            and "*" in starred(row.name)
            and replace(row, name="", times=1) == replace(last, name="", times=1)
        ):
            members.append(row.name)
            found[-1] = replace(last, name=fold(members), times=last.times + row.times)
        else:
            found.append(row)
            members = [getattr(row, "name", "")]
    return found


def _fold_blocks(rows: list[Row]) -> list[Row]:
    groups: dict[tuple[str, tuple[Row, ...]], list[Frame]] = {}
    for row in rows:
        if isinstance(row, Frame) and row.block and row.times == 1:
            groups.setdefault((starred(row.name), _core(row)), []).append(row)
    found: list[Row] = []
    for row in rows:
        if not (isinstance(row, Frame) and row.block and row.times == 1):
            found.append(row)
            continue
        group = groups[starred(row.name), _core(row)]
        if row is not group[0]:
            continue
        if all(r.rows == row.rows for r in group):
            found.append(replace(row, name=fold([r.name for r in group]), times=len(group)))
            continue
        ends = [_ends(r) for r in group]
        usual = [Counter(tuple(e[i]) for e in ends).most_common(1)[0][0] for i in (0, 1)]  # first and last may differ
        for (lead, _), r in zip(ends, group):
            found.extend(_elsewhere(lead, usual[0], r.name))
        rows_ = (*usual[0], *_core(row), *usual[1])
        found.append(replace(row, name=fold([r.name for r in group]), times=len(group), rows=rows_))
        for (_, tail), r in zip(ends, group):
            found.extend(_elsewhere(tail, usual[1], r.name))
    return found


def _ends(frame: Frame) -> tuple[list[Border], list[Border]]:
    """The collectives before everything else in a frame, and after."""
    rows = list(frame.rows)
    lead: list[Border] = []
    tail: list[Border] = []
    while rows and isinstance(rows[0], Border):
        lead.append(rows.pop(0))  # type: ignore[arg-type]
    while rows and isinstance(rows[-1], Border):
        tail.insert(0, rows.pop())  # type: ignore[arg-type]
    return lead, tail


def _elsewhere(mine: Sequence[Border], usual: Sequence[Border], name: str) -> list[Border]:
    """The collectives of an end of one block that are not those of most."""
    if tuple(mine) == tuple(usual):
        return []
    where = f"in {name} instead" if usual else f"only in {name}"
    return [replace(b, where=where) for b in mine or [Border("", "", 0)]]


def _core(frame: Frame) -> tuple[Row, ...]:
    """A block but for the collectives of its two ends, of which the first and the last block may have others."""
    lead, tail = _ends(frame)
    return frame.rows[len(lead) : len(frame.rows) - len(tail)]


def merged(rows: Iterable[Row]) -> list[Row]:
    """Collectives, and operations, that are alike and follow each other as one."""
    found: list[Row] = []
    for row in rows:
        last = found[-1] if found else None
        if isinstance(row, Border) and isinstance(last, Border) and replace(last, times=1) == replace(row, times=1):
            found[-1] = replace(last, times=last.times + row.times)
        elif isinstance(row, Box) and isinstance(last, Box) and not row.of and not last.of and last.name == row.name:
            styles = [last.style] if last.style == row.style else [last.style, row.style]
            found[-1] = replace(
                last, style="; ".join(dict.fromkeys(s for x in styles for s in x.split("; "))), times=last.times + 1
            )
        else:
            found.append(row)
    return found


def beside(rows: list[Row]) -> list[Row]:
    """Boxes that read the same tensor side by side."""
    found: list[Row] = []
    for row in rows:
        last = found[-1] if found else None
        if isinstance(row, Box) and row.tensor:
            mates = last.boxes if isinstance(last, Side) else (last,) if isinstance(last, Box) else ()
            if mates and (mates[-1].tensor, mates[-1].cut, mates[-1].of) == (row.tensor, row.cut, row.of) and len(mates) < 4:
                found[-1] = Side((*mates, row))
                continue
        found.append(row)
    return found


def partial(rows: list[Row], tp: int) -> list[Row]:
    """What leaves a module is a term of a sum, if what follows adds the ranks' terms up."""
    found: list[Row] = []
    for row, after in zip(rows, [*rows[1:], None]):
        if isinstance(row, Box) and isinstance(after, Border) and after.forward in ("all-reduce", "reduce-scatter"):
            scattered = after.forward == "reduce-scatter"
            shape = row.leaves.whole if scattered else row.leaves.local
            sizes = (
                math.prod(shape),
                tp * math.prod(row.leaves.local) if scattered else 0,
            )  # of a length that tp does not divide, padded
            if shape and any(after.bytes == n * numel for n in (1, 2, 4, 8) for numel in sizes):  # not what a loss sums
                row = replace(row, leaves=State(row.leaves.whole, shape, "partial"))
        found.append(row)
    return found
