"""Fill in what the rules of a plan leave open."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from lightning_tp.plan.match import Match, Names
from lightning_tp.styles import Colwise, FusedColwise, PrepareInput, Replicate, Rowwise, Sequence, Style, VocabEmbedding, VocabHead

HEAD_DIMS = ("head_dim", "head_size", "d_head", "attention_head_size")


HEADS = ("num_heads", "n_heads", "n_head", "num_attention_heads", "nhead")


def _regions(matched: list[Match], names: Names) -> dict[str, str]:
    """The modules around a row-wise layer and the column-wise layers before it: their input is gathered at the door.

    Where such a module also holds norms that run on shards of the sequence, or is the whole model, its column-wise layers gather
    for themselves.
    """
    prepared = {m.where for m in matched if isinstance(m.style, PrepareInput)}
    cols = [m.where for m in matched if _is_open_colwise(m.style)]
    rows = [m.where for m in matched if isinstance(m.style, Rowwise) and m.style.input == "width"]
    streams = [m.where for m in matched if isinstance(m.style, (Sequence, VocabEmbedding, VocabHead))]
    regions: dict[str, str] = {}
    for row in rows:
        inside: list[str] = []
        door = row
        while door and not inside:
            door = door.rpartition(".")[0]
            inside = [c for c in cols if _below(c, door)]
        if door in prepared or not inside or any(_below(p, door) and _below(row, p) for p in prepared):
            continue
        alone = sum(_below(r, door) for r in rows) == 1 and not any(_below(s, door) for s in streams)
        if not alone or isinstance(names.modules[door], (nn.ModuleList, nn.ModuleDict)) or not (door or names.is_sequential):
            continue
        readers = ", ".join(c.rpartition(".")[2] for c in inside)
        regions[door] = f"gathered once for {readers}; {row.rpartition('.')[2]} sums"
    return regions


def _is_open_colwise(style: Style) -> bool:
    return isinstance(style, (Colwise, FusedColwise)) and style.input is None


def _below(name: str, module: str) -> bool:
    return not module or name.startswith(f"{module}.")


def _filled_in(m: Match, matched: list[Match], names: Names, regions: dict[str, str], stream: Any, tp: int) -> Style:
    """The style with every option that its rule left to the plan."""
    style, module = m.style, names.modules.get(m.where)
    if isinstance(style, (Colwise, FusedColwise)):
        if isinstance(module, nn.Embedding):
            return replace(style, output=stream) if isinstance(style, Colwise) and style.output == "width" else style
        if style.input is None:
            doors = [
                *regions,
                *(x.where for x in matched if isinstance(x.style, PrepareInput) and x.style.wanted == "gathered"),
            ]
            style = replace(style, input="gathered" if any(_below(m.where, d) for d in doors) else stream)
        if isinstance(style, Colwise) and isinstance(module, nn.Linear) and style.output == "width":  # who gathers may cut heads
            if (style.heads, style.ranges) != (None, None):
                return style
            heads, query_heads = _heads(m.where, module, matched, names)
            style = replace(style, heads=heads, query_heads=query_heads)
        return style
    if isinstance(style, (Rowwise, VocabEmbedding)) and style.output is None:
        return replace(style, output=stream)
    if isinstance(style, VocabHead) and style.input is None:
        return replace(style, input=stream)
    if isinstance(style, PrepareInput) and style.arrives is None:
        return replace(style, arrives=stream)
    if isinstance(style, Replicate) and style.partial_grad is None:
        return replace(style, partial_grad=_works_on_shards(m.where, matched, names, regions))
    return style


def _heads(where: str, module: nn.Linear, matched: list[Match], names: Names) -> tuple[int | None, int | None]:
    """(heads of this layer, heads that attend), from the sizes that the module around it stores; (None, None) for an MLP."""
    parent = names.modules[where.rpartition(".")[0]]
    beside = [x for x in matched if x.where.rpartition(".")[0] == where.rpartition(".")[0]]
    linears = [(x.style, m) for x in beside if isinstance(m := names.modules.get(x.where), nn.Linear)]
    widths = {m.out_features for style, m in linears if isinstance(style, Colwise)}
    read = widths & {m.in_features for style, m in linears if isinstance(style, Rowwise)} or widths
    head_dim = next((v for n in HEAD_DIMS if isinstance(v := getattr(parent, n, None), int)), None)
    heads = next((v for n in HEADS if isinstance(v := getattr(parent, n, None), int)), None)
    # the width of all heads is one that a row-wise layer reads; of two, the smaller: the other is an MLP beside the attention
    if head_dim is None:
        queries = min((w for w in read if heads and w % heads == 0), default=None)
        if not heads or queries is None:
            return None, None
        head_dim = queries // heads
    elif head_dim > 0:
        queries = min((w for w in read if w % head_dim == 0), default=None)
    if head_dim < 1 or queries is None or module.out_features % head_dim or module.out_features > queries:
        return None, None
    return module.out_features // head_dim, queries // head_dim


def _works_on_shards(where: str, matched: list[Match], names: Names, regions: dict[str, str]) -> bool:
    """Whether a whole parameter lies between split layers, so that each rank sees its share of the gradient only.

    Inside a module whose input is gathered at the door all of them do. Elsewhere, what sits beside column- and row-wise layers does,
    unless it has the width that goes into them: then it is a norm in front of them.
    """
    doors = [
        *regions,
        *(x.where for x in matched if isinstance(x.style, PrepareInput) and x.style.wanted == "gathered"),
    ]
    if any(_below(where, door) for door in doors):
        return True
    parent = where if where in names.modules else where.rpartition(".")[0]  # the module that owns it
    around = parent.rpartition(".")[0]
    beside = [x for x in matched if x.where.rpartition(".")[0] == around]
    cols = [
        x.where for x in beside if isinstance(x.style, (Colwise, FusedColwise)) and getattr(x.style, "output", "width") == "width"
    ]
    rows = [x.where for x in beside if isinstance(x.style, Rowwise) and x.style.input == "width"]
    if not cols or not rows or not around:
        return False
    widths = {getattr(names.modules[c], "in_features", None) for c in cols}
    mine = {p.shape[-1] for n, p in names.parameters.items() if (n == where or _below(n, where)) and p.ndim}
    return not mine & widths
