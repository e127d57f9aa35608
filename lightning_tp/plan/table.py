"""A plan as a table to read: blocks that are alike folded into one line."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

from lightning_tp.core.modules.blocks import fold

if TYPE_CHECKING:
    from lightning_tp.plan.plan import Plan
    from lightning_tp.plan.rule import Entry


def rules_table(plan: Plan) -> str:
    """The rules of a plan that has not met a model yet."""
    rows = [(r.pattern, str(r.style), r.reason) for r in plan.rules]
    return "\n".join([f"Plan, {plan.source}: {len(rows)} rules", *columns([("modules", "style", "reason"), *rows])])


def shapes_table(plan: Plan) -> str:
    """What each rank holds: one line for each kind of module, the numbers of the blocks folded (`layers.{0-3}.wq`)."""
    rows = shapes_rows(plan)
    total, held = numels(plan)
    head = (
        f"Plan, {plan.source}, tp={plan.tp}: {total:,} parameters, a rank holds {held:,} ({held / max(total, 1):.1%}); "
        f"sequence parallel {'on' if plan.sequence_parallel else 'off'}"
    )
    return "\n".join([head, *columns([("modules", "style", "whole -> on a rank", "reason"), *rows])])


def shapes_rows(plan: Plan) -> list[tuple[str, str, str, str]]:
    """(modules, style, whole -> on a rank, reason) of each kind of module of a checked plan."""
    assert plan.tp is not None
    groups: dict[tuple[str, str, str, str], list[Entry]] = {}
    for entry in plan.entries:
        key = (re.sub(r"\d+", "*", entry.where), str(entry.style), _shapes(entry, plan.tp), entry.reason)
        groups.setdefault(key, []).append(entry)
    return [
        (fold([e.where for e in entries]) or "(the model)", style, shapes, reason)
        for (_, style, shapes, reason), entries in groups.items()
    ]


def numels(plan: Plan) -> tuple[int, int]:
    """(elements of all parameters, elements that the first rank holds); tied weights once."""
    import math

    total = held = 0
    for name, split in plan.splits.items():
        if name not in plan.tied:
            total += math.prod(plan.shapes[name])
            held += math.prod(split.local_shape(plan.shapes[name], 0))
    return total, held


def _shapes(entry: Entry, tp: int) -> str:
    lines = []
    for name, split in entry.splits.items():
        whole = entry.shapes[name]
        local = dict.fromkeys(split.local_shape(whole, r) for r in range(tp))
        what = str(whole) if split.dim is None else f"{whole} -> {' | '.join(map(str, local))}"
        lines.append(what + (f" grad summed over {split.sum_over}" if split.sum_over > 1 else ""))
    return "; ".join(dict.fromkeys(lines))


def columns(rows: Sequence[Sequence[str]], left: Container[int] | None = None) -> list[str]:
    """The lines of a table; the columns `left` (default: all) begin below each other, the others end so.

    Example:
        >>> columns([("name", "bytes"), ("q", "1,024")], left={0})
        ['  name  bytes', '  q     1,024']
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.ljust(w) if left is None or i in left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
