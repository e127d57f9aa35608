"""Hold a plan against a model: match its rules, fill in what they leave open, split every parameter, refuse what can't be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_tp.errors import TPError
from lightning_tp.styles import (
    Colwise,
    FusedColwise,
    PrepareInput,
    Replicate,
    Rowwise,
    Sequence,
    ShardParameter,
    Split,
    Style,
    VocabEmbedding,
    VocabHead,
)

if TYPE_CHECKING:
    from lightning_tp.plan import Entry, Plan, Rule

INFERRED = "inferred"  # how the source of a plan begins that was found: it may be right in splitting nothing
HEAD_DIMS = ("head_dim", "head_size", "d_head", "attention_head_size")
HEADS = ("num_heads", "n_heads", "n_head", "num_attention_heads", "nhead")


def check_plan(plan: Plan, model: nn.Module, tp: int) -> list[Entry]:
    """The entries of `plan` on `model`, in the order of the model's modules; see `Plan.check`."""
    if not isinstance(tp, int) or isinstance(tp, bool) or tp < 1:
        raise TPError(f"`tp={tp!r}`: the number of ranks that share one model is 1 or more.")
    refuse_wrapped(model)
    names = Names(model)
    matched = _match(plan, names)
    matched = [replace(m, style=_for_module(m.style, names.modules.get(m.where))) for m in matched]
    stream = "sequence" if plan.sequence_parallel else "replicate"
    regions = _regions(matched, names) if stream == "sequence" else {}
    matched += [Match(w, PrepareInput(arrives="sequence"), reason, None) for w, reason in regions.items()]
    matched = [replace(m, style=_filled_in(m, matched, names, regions, stream, tp)) for m in matched]
    entries = [_entry(m, names, tp) for m in matched]
    _every_parameter_once(entries, matched, names, model)
    _same_split_where_tied(entries, names)
    if not plan.source.startswith(INFERRED) and tp > 1 and not any_split(entries):
        raise TPError(splits_nothing(plan, model, tp))
    order = {name: i for i, name in enumerate(names.everything)}
    return sorted(entries, key=lambda e: order[e.where])


def any_split(entries: Iterable[Entry]) -> bool:
    """Whether a rank holds less than all of any parameter."""
    return any(split.dim is not None for entry in entries for split in entry.splits.values())


def splits_nothing(plan: Plan, model: nn.Module, tp: int) -> str:
    """What is wrong with a plan that keeps all parameters whole."""
    if plan.source.startswith(INFERRED):
        reasons = "; ".join(f"`{rule.pattern}`: {rule.reason}" for rule in plan.rules[:3])
        why = f"Nothing in its forward can be split over ranks ({reasons}). Give a plan (`plan=`), or use tp=1."
    else:
        why = "Give linear layers the styles `colwise` and `rowwise`, or use tp=1."
    return (
        f"The plan ({plan.source}) splits nothing of {type(model).__name__}: its rules keep every parameter whole on every rank, which is "
        f"tp={tp} times the same work. {why}"
    )


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a model that something else has distributed already."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    for name, module in model.named_modules():
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel, FullyShardedDataParallel, FSDPModule)):
            kind = "FSDP2's fully_shard" if isinstance(module, FSDPModule) else type(module).__name__
            raise TPError(
                f"`{name or 'the model'}` is wrapped by {kind} already. Hand over the plain module: it is split over the "
                "tensor-parallel axis first, and FSDP2 is applied over the data-parallel axis after that, by itself."
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) or hasattr(parameter, "_ltp"):
            raise TPError(
                f"`{name}` is split already (a {type(parameter.data).__name__}). A plan is applied once, to the plain module."
            )


class Names:
    """A model's modules and parameters by their names from the root; shared ones under each name."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))
        self.everything = [*self.modules, *self.parameters]
        self.is_sequential = type(model) is nn.Sequential

    def slot(self, parameter: str) -> tuple[int, str]:
        """The one place in a module where a parameter sits, whatever the names that lead there."""
        where, _, leaf = parameter.rpartition(".")
        return id(self.modules[where]), leaf

    def anchors(self) -> Iterator[str]:
        """Where a relative plan may begin: the root, then what it holds, breadth first."""
        holders = [n for n, m in self.modules.items() if next(m.children(), None) is not None]
        yield from sorted(holders or [""], key=lambda n: (n.count(".") + bool(n), n))


@dataclass(frozen=True)
class Match:
    """A module, or parameter, that a rule matches."""

    where: str
    style: Style
    reason: str
    rule: int | None  # None: found, not given


def _match(plan: Plan, names: Names) -> list[Match]:
    rules = [(i, rule) for i, rule in enumerate(plan.rules) if rule.pattern != "**"]
    best: tuple[int, str, dict[int, list[str]]] | None = None
    for anchor in names.anchors():
        prefix = f"{anchor}." if anchor else ""
        inside = [n for n in names.everything if n.startswith(prefix)] if prefix else names.everything
        found = {i: [n for n in inside if rule.matches(n.removeprefix(prefix))] for i, rule in rules}
        hits = sum(map(bool, found.values()))
        if best is None or hits > best[0]:
            best = (hits, anchor, found)
        if hits == len(rules):
            break
    assert best is not None
    _, anchor, found = best
    for i, rule in rules:
        if not found[i]:
            raise TPError(_nothing_matches(rule, anchor, names))
    for i, rule in rules:
        if isinstance(rule.style, (Replicate, Sequence)):  # these take all that lies below a module, so `head.**` is one match
            every = set(found[i])
            found[i] = [n for n in found[i] if not _is_inside(n, every)]
    matches = [Match(where, plan.rules[i].style, plan.rules[i].reason, i) for i, wheres in found.items() for where in wheres]
    return matches + list(_caught(plan, matches, names))


def _is_inside(name: str, modules: set[str]) -> bool:
    """Whether one of these modules holds what has this name."""
    while name:
        name = name.rpartition(".")[0]
        if name in modules:
            return True
    return False


def _nothing_matches(rule: Rule, anchor: str, names: Names) -> str:
    prefix = f"{anchor}." if anchor else ""
    there = [n.removeprefix(prefix) for n in names.everything if n.startswith(prefix) and n != anchor]
    generic = list(dict.fromkeys(".".join("*" if p.isdigit() else p for p in n.split(".")) for n in there))
    leaf = rule.pattern.rpartition(".")[2]
    alike = difflib.get_close_matches(rule.pattern, [n for n in generic if n.rpartition(".")[2] == leaf], n=3, cutoff=0.0)
    near = [*alike, *difflib.get_close_matches(rule.pattern, generic, n=3, cutoff=0.3)] or generic
    near = list(dict.fromkeys(near))[:3]
    return (
        f"The rule `{rule.pattern}` -> `{rule.style}` matches no module and no parameter"
        + (f" of `{anchor}`" if anchor else "")
        + f" ({len(there)} names). Nearest: {', '.join(f'`{n}`' for n in near)}. Correct the pattern, or take the rule out."
    )


def _caught(plan: Plan, matches: list[Match], names: Names) -> Iterator[Match]:
    """What the catch-all rule covers: the parameters of each module that no other rule names."""
    catch = next(((i, r) for i, r in enumerate(plan.rules) if r.pattern == "**"), None)
    if catch is None:
        return
    i, rule = catch
    if not isinstance(rule.style, Replicate):
        raise TPError(f"The catch-all rule `**` can only be `replicate`, not `{rule.style}`: name the modules that are split.")
    claimed = [m.where for m in matches if m.style.splits_parameters]
    named = [n for n in names.parameters if any(n == c or n.startswith(f"{c}.") or not c for c in claimed)]
    tied = {id(names.parameters[n]) for n in named}
    for name, p in names.parameters.items():
        if id(p) not in tied:
            yield Match(name, rule.style, rule.reason or "no other rule names it", i)


def _for_module(style: Style, module: nn.Module | None) -> Style:
    """torch calls both ends of a row-wise split `RowwiseParallel`; on an embedding it is ours over the vocabulary."""
    if isinstance(style, Rowwise) and isinstance(module, nn.Embedding):
        return VocabEmbedding(output=style.output)
    return style


# ------------------------------------------------------------------------------------------------- what rules leave open


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


# ------------------------------------------------------------------------------------------------------------- entries


def _entry(m: Match, names: Names, tp: int) -> Entry:
    from lightning_tp.plan import Entry

    if m.where not in names.modules:  # the rule names a parameter
        if isinstance(m.style, ShardParameter):
            splits = {m.where: m.style.split(tp)}
        elif isinstance(m.style, Replicate):
            splits = {m.where: Split(sum_over=tp if m.style.partial_grad else 1)}
        elif isinstance(m.style, Sequence):
            splits = {m.where: Split(sum_over=tp)}
        else:
            raise TPError(
                f"`{m.where}` is a parameter; the style `{m.style.name}` is for modules. Only `replicate` names parameters."
            )
    else:
        module = names.modules[m.where]
        prefix = f"{m.where}." if m.where else ""
        splits = {prefix + name: split for name, split in m.style.splits(module, m.where, tp).items()}
        for name in splits:
            if name not in names.parameters:
                raise TPError(
                    f"`{m.where}`: the style `{m.style.name}` splits `{name.removeprefix(prefix)}`, which is no parameter of this "
                    f"{type(module).__name__} (a parametrization, such as weight norm, replaces it). Use `replicate` for it."
                )
    shapes = {name: tuple(names.parameters[name].shape) for name in splits}
    return Entry(m.where, m.style, m.reason, splits, shapes)


def _every_parameter_once(entries: list[Entry], matched: list[Match], names: Names, model: nn.Module) -> None:
    once: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        which = str(getattr(entry.style, "arg", "")) + str(getattr(entry.style, "index", ""))
        kind = "parameters" if entry.style.splits_parameters else entry.style.name + which
        other = once.setdefault((entry.where, kind), entry)
        if other is not entry:
            raise TPError(
                f"`{entry.where}`: two rules for one module, `{other.style.name}` and `{entry.style.name}`. Make one pattern narrower; "
                "only the catch-all rule `**` gives way to the others."
            )
    owner: dict[str, Entry] = {}
    for entry in entries:
        for name in entry.splits:
            if name in owner:
                raise TPError(
                    f"`{name}`: two rules for one weight, `{owner[name].style.name}` on `{owner[name].where}` and "
                    f"`{entry.style.name}` on `{entry.where}`. Make one pattern narrower; only the catch-all rule `**` gives way."
                )
            owner[name] = entry
    covered = {names.slot(n) for n in owner}  # a module that is there twice needs one rule
    left = [n for n in names.parameters if names.slot(n) not in covered]
    by_id = {id(names.parameters[n]): n for n in owner}
    for name in left:
        tied = by_id.get(id(names.parameters[name]))
        if tied and owner[tied].splits[tied].dim is not None:  # else it is whole under this name too
            raise TPError(
                f"`{tied}` and `{name}` are one tied weight, but only the first is split (`{owner[tied].style.name}`), and "
                f"`{name}` is in no rule. Tied embedding and head go together as `vocab_embedding` and `vocab_head`, or both as "
                "`replicate`."
            )
    left = [n for n in left if id(names.parameters[n]) not in by_id]
    if left:
        shown = ", ".join(f"`{n}` {tuple(names.parameters[n].shape)}" for n in left[:4])
        raise TPError(
            f"{len(left)} of {len(names.parameters)} parameters of {type(model).__name__} are in no rule: {shown}"
            + (", .." if len(left) > 4 else "")
            + ". Give them a style; to keep all that are left whole on every rank, say so with the rule `'**': 'replicate'`."
        )


def _same_split_where_tied(entries: list[Entry], names: Names) -> None:
    first: dict[int, tuple[str, Split, Entry]] = {}
    for entry in entries:
        for name, split in entry.splits.items():
            before = first.setdefault(id(names.parameters[name]), (name, split, entry))
            if before[1] != split:
                raise TPError(
                    f"`{before[0]}` and `{name}` are one tied weight, but `{before[2].style.name}` and `{entry.style.name}` split it "
                    "in two ways. Tied embedding and head go together as `vocab_embedding` and `vocab_head`, or both as `replicate`."
                )
