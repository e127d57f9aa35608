"""Hold a plan against a model: match its rules, fill in what they leave open, split every parameter, refuse what can't be right."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from lightning_tp.errors import TPError
from lightning_tp.plan.complete import _filled_in, _regions
from lightning_tp.plan.match import Match, Names, _for_module, _match
from lightning_tp.styles import PrepareInput, Replicate, Sequence, ShardParameter, Split

if TYPE_CHECKING:
    from lightning_tp.plan.plan import Plan
    from lightning_tp.plan.rule import Entry

INFERRED = "inferred"  # how the source of a plan begins that was found: it may be right in splitting nothing


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
        if isinstance(parameter, DTensor) or hasattr(parameter, "_tp_shard"):
            raise TPError(
                f"`{name}` is split already (a {type(parameter.data).__name__}). A plan is applied once, to the plain module."
            )


def _entry(m: Match, names: Names, tp: int) -> Entry:
    from lightning_tp.plan.rule import Entry

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
