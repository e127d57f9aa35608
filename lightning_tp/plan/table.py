"""The tables of a plan: its rules, and what a rank holds of each kind of module, repeated blocks folded into one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from lightning_tp.core.modules.blocks import fold
from lightning_tp.core.tables import table
from lightning_tp.plan.rule import Rule
from lightning_tp.styles import Split

Row = tuple[str, str, str, str]
"""(module, style, full shape -> local shard, reason)."""


def rules_table(rules: Sequence[Rule]) -> str:
    """Format the rules of a plan that was not checked against a model yet."""
    return table(["modules", "style", "reason"], [(r.pattern, str(r.style), r.reason) for r in rules])


def rows_table(rows: Iterable[Row]) -> str:
    """Format the rows of a checked plan."""
    return table(["modules", "style", "full shape -> local shard", "reason"], list(rows))


def fold_rows(rows: Iterable[Row]) -> list[Row]:
    """Fold the rows of repeated blocks: `layers.0.wq`, `layers.1.wq` -> `layers.{0-1}.wq`.

    Example:
        >>> fold_rows([("layers.0.wq", "colwise", "", ""), ("layers.1.wq", "colwise", "", "")])
        [('layers.{0-1}.wq', 'colwise', '', '')]
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, *rest in rows:
        groups.setdefault((re.sub(r"\d+", "*", name), *rest), []).append(name)
    return [(fold(names) or "(the model)", style, shapes, reason) for (_, style, shapes, reason), names in groups.items()]


def shapes_of(splits: Mapping[str, Split], shapes: Mapping[str, tuple[int, ...]], tp: int) -> str:
    """Format what a rank holds of the parameters of a module: `(8, 4) -> (4, 4); (8,) -> (4,)`.

    Where ranks hold shards of different sizes, all of them are given: `(5, 4) -> (3, 4) | (2, 4)`.
    """
    parts = []
    for name, split in splits.items():
        full = shapes[name]
        local = dict.fromkeys(split.local_shape(full, rank) for rank in range(tp))
        text = str(full) if split.dim is None else f"{full} -> {' | '.join(map(str, local))}"
        if split.state is None:
            text += " gradient checked in the first backward pass"
        elif (ranks := split.sum_over(tp)) > 1:
            text += f" gradient summed over {ranks} ranks"
        parts.append(text)
    return "; ".join(dict.fromkeys(parts))
