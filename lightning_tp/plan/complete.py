"""Fill in what the rules of a plan leave open, from the other rules and the model: `fill_in(matches, ..)`.

In a sequence-parallel plan, boundaries are added around the modules that hold column- and row-wise layers: their input is all-gathered
once, where the module is entered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from lightning_tp.core.comm.state import SEQUENCE, WIDTH, I, R, State
from lightning_tp.plan.match import Match, Names, is_below
from lightning_tp.styles import Colwise, FusedColwise, PrepareInput, Rowwise, Sequence, Style, VocabEmbedding, VocabHead

HEAD_DIMS = ("head_dim", "head_size", "d_head", "attention_head_size")
HEADS = ("num_heads", "n_heads", "n_head", "num_attention_heads", "nhead")


def fill_in(matches: list[Match], names: Names, *, sequence_parallel: bool) -> list[Match]:
    """Return the matches with every option of their styles, and in a sequence-parallel plan with the boundaries that they imply."""
    if sequence_parallel:
        matches = [*matches, *_boundaries(matches, names)]
    context = Context(matches, names, SEQUENCE if sequence_parallel else I)
    return [replace(m, style=m.style.fill_in(m.where, names.modules.get(m.where), context)) for m in matches]


@dataclass(frozen=True)
class Context:
    """What the rest of a plan says about a module: a `PlanContext`, for `Style.fill_in`."""

    matches: list[Match]
    names: Names
    stream: State

    @cached_property
    def _boundaries(self) -> list[str]:
        return [m.where for m in self.matches if isinstance(m.style, PrepareInput) and m.style.wanted == R]

    @cached_property
    def _by_parent(self) -> dict[str, list[Match]]:
        by_parent: dict[str, list[Match]] = {}
        for m in self.matches:
            by_parent.setdefault(m.where.rpartition(".")[0], []).append(m)
        return by_parent

    def is_inside_boundary(self, where: str) -> bool:
        """Whether a module around this one takes its input to `R`."""
        return any(is_below(where, boundary) for boundary in self._boundaries)

    def is_beside_split_layers(self, where: str) -> bool:
        """Whether column- and row-wise layers stand in the module that holds this one, and it is not the root."""
        owner = where if where in self.names.modules else where.rpartition(".")[0]
        parent = owner.rpartition(".")[0]
        styles = [m.style for m in self._by_parent.get(parent, ())]
        return bool(parent) and any(map(_leaves_sharded, styles)) and any(map(_reads_sharded, styles))

    def heads(self, where: str) -> tuple[int | None, int | None]:
        """(heads of this linear layer, heads that attend), from the sizes that the module around it stores; (None, None) for an MLP."""
        parent = where.rpartition(".")[0]
        modules = self.names.modules
        linears = [(m.style, modules.get(m.where)) for m in self._by_parent[parent]]
        widths = {m.out_features for style, m in linears if isinstance(style, Colwise) and isinstance(m, nn.Linear)}
        read = {m.in_features for style, m in linears if isinstance(style, Rowwise) and isinstance(m, nn.Linear)}
        return _heads(modules[parent], modules[where].out_features, widths, (widths & read) or widths)


def _heads(attention: nn.Module, width: Any, widths: set[int], read: set[int]) -> tuple[int | None, int | None]:
    head_dim = next((v for n in HEAD_DIMS if isinstance(v := getattr(attention, n, None), int)), None)
    heads = next((v for n in HEADS if isinstance(v := getattr(attention, n, None), int)), None)
    # the width of all heads is one that a row-wise layer reads; of two, the smaller: the other is an MLP beside the attention
    if head_dim is None:
        queries = min((w for w in read if heads and w % heads == 0), default=None)
        if not heads or queries is None:
            return None, None
        head_dim = queries // heads
    else:
        queries = min((w for w in read if head_dim > 0 and w % head_dim == 0), default=None)
    if head_dim < 1 or queries is None or width % head_dim or width > queries:
        return None, None
    return width // head_dim, queries // head_dim


def _leaves_sharded(style: Style) -> bool:
    return isinstance(style, FusedColwise) or (isinstance(style, Colwise) and style.output == WIDTH)


def _reads_sharded(style: Style) -> bool:
    return isinstance(style, Rowwise) and style.input == WIDTH


def _boundaries(matches: list[Match], names: Names) -> Iterator[Match]:
    """The modules around one row-wise layer and the column-wise layers before it whose rules leave their input open.

    Where such a module also holds norms that run on sequence shards, several row-wise layers, or is the whole model, its column-wise
    layers gather for themselves.
    """
    prepared = [m.where for m in matches if isinstance(m.style, PrepareInput)]
    columns = [m.where for m in matches if isinstance(m.style, (Colwise, FusedColwise)) and m.style.input is None]
    rows = [m.where for m in matches if _reads_sharded(m.style)]
    on_stream = [m.where for m in matches if isinstance(m.style, (Sequence, VocabEmbedding, VocabHead))]
    found: dict[str, str] = {}
    for row in rows:
        around, inside = _around(row, columns)
        is_prepared = around in prepared or any(is_below(p, around) and is_below(row, p) for p in prepared)
        is_alone = sum(is_below(r, around) for r in rows) == 1 and not any(is_below(s, around) for s in on_stream)
        if inside and is_alone and not is_prepared and _is_called(around, names):
            readers = ", ".join(c.rpartition(".")[2] for c in inside)
            found[around] = f"input all-gathered once for {readers}; {row.rpartition('.')[2]} reduces"
    for where, reason in found.items():
        yield Match(where, PrepareInput(arrives=SEQUENCE), reason)


def _around(row: str, columns: list[str]) -> tuple[str, list[str]]:
    """(the innermost module that holds the row-wise layer and column-wise ones, those)."""
    inside: list[str] = []
    around = row
    while around and not inside:
        around = around.rpartition(".")[0]
        inside = [c for c in columns if is_below(c, around)]
    return around, inside


def _is_called(module: str, names: Names) -> bool:
    """Whether this is a module with a forward of its own that takes activations: no list of modules, and not the whole model."""
    return (bool(module) or names.is_sequential) and not isinstance(names.modules[module], (nn.ModuleList, nn.ModuleDict))
