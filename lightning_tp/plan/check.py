"""Hold the rules of a plan against a model: match them, fill in what they leave open, split every parameter, refuse what can't be right."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_tp.core.comm.state import R
from lightning_tp.errors import TPError
from lightning_tp.plan.checked import CheckedPlan, Entry
from lightning_tp.plan.complete import fill_in
from lightning_tp.plan.match import Match, Names, match_rules
from lightning_tp.plan.rule import INFERRED, Rule, is_sequence_parallel
from lightning_tp.styles import Replicate, ShardParameter, Split
from lightning_tp.styles import Sequence as SequenceStyle


def check_rules(rules: Sequence[Rule], source: str, model: nn.Module, tp: int) -> CheckedPlan:
    """Return the checked plan of these rules on `model`; see `Plan.check`."""
    if not isinstance(tp, int) or isinstance(tp, bool) or tp < 1:
        raise TPError(f"`tp={tp!r}`: the number of ranks that share one model is 1 or more.")
    refuse_distributed(model)
    names = Names(model)
    matches = fill_in(match_rules(rules, names), names, sequence_parallel=is_sequence_parallel(rules))
    entries = [_entry(m, names, tp) for m in matches]
    _refuse_two_styles(entries)
    owners = _owners(entries)
    _refuse_uncovered(owners, names, model)
    _refuse_tied_split_twice(entries, names)
    order = {name: i for i, name in enumerate(names.everything)}
    first = {name for name, _ in model.named_parameters()}
    checked = CheckedPlan(
        tuple(rules),
        source,
        tuple(sorted(entries, key=lambda e: order[e.where])),
        tp,
        frozenset(name for name in names.parameters if name not in first),
    )
    if not source.startswith(INFERRED) and tp > 1 and not checked.shards_anything:
        raise TPError(checked.why_nothing_is_sharded(model))
    return checked


def refuse_distributed(model: nn.Module) -> None:
    """Refuse a model that something else has distributed already.

    Raises:
        TPError: it names the module or the parameter.
    """
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    for name, module in model.named_modules():
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel, FullyShardedDataParallel, FSDPModule)):
            kind = "FSDP2's fully_shard" if isinstance(module, FSDPModule) else type(module).__name__
            raise TPError(
                f"`{name or 'the model'}` is wrapped by {kind} already. Pass the plain module: it is split over the tensor-parallel axis "
                "first, and FSDP2 is applied over the data-parallel axis after that."
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) or hasattr(parameter, "_tp_shard"):
            raise TPError(
                f"`{name}` is split already (a {type(parameter.data).__name__}). A plan is applied once, to the plain module."
            )


def _entry(m: Match, names: Names, tp: int) -> Entry:
    splits = _splits_of_parameter(m, tp) if m.where not in names.modules else _splits_of_module(m, names, tp)
    for split in splits.values():
        split.sum_over(tp)  # refuses what can't be summed
    shapes = {name: tuple(names.parameters[name].shape) for name in splits}
    return Entry(m.where, m.style, m.reason, splits, shapes)


def _splits_of_parameter(m: Match, tp: int) -> dict[str, Split]:
    if isinstance(m.style, ShardParameter):
        return {m.where: m.style.split(tp)}
    if isinstance(m.style, Replicate):
        return {m.where: Split(m.style.state)}
    if isinstance(m.style, SequenceStyle):
        return {m.where: Split(R)}
    raise TPError(f"`{m.where}` is a parameter; the style `{m.style.name}` is for modules. Only `replicate` names parameters.")


def _splits_of_module(m: Match, names: Names, tp: int) -> dict[str, Split]:
    module = names.modules[m.where]
    prefix = f"{m.where}." if m.where else ""
    splits = {prefix + name: split for name, split in m.style.splits(module, m.where, tp).items()}
    for name in splits:
        if name not in names.parameters:
            raise TPError(
                f"`{m.where}`: the style `{m.style.name}` splits `{name.removeprefix(prefix)}`, which is not a parameter of this "
                f"{type(module).__name__} (a parametrization, such as weight norm, replaces it). Use `replicate` for it."
            )
    return splits


def _refuse_two_styles(entries: list[Entry]) -> None:
    """One style that splits parameters for each module, and one of a kind of those that don't, for each argument or output."""
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


def _owners(entries: list[Entry]) -> dict[str, Entry]:
    """For each parameter that is covered, its entry; one of them."""
    owners: dict[str, Entry] = {}
    for entry in entries:
        for name in entry.splits:
            if name in owners:
                raise TPError(
                    f"`{name}`: two rules for one weight, `{owners[name].style.name}` on `{owners[name].where}` and "
                    f"`{entry.style.name}` on `{entry.where}`. Make one pattern narrower; only the catch-all rule `**` gives way."
                )
            owners[name] = entry
    return owners


def _refuse_uncovered(owners: dict[str, Entry], names: Names, model: nn.Module) -> None:
    covered = {names.slot(n) for n in owners}  # a module that is there twice needs one rule
    left = [n for n in names.parameters if names.slot(n) not in covered]
    by_id = {id(names.parameters[n]): n for n in owners}
    for name in left:
        tied = by_id.get(id(names.parameters[name]))
        if tied and owners[tied].splits[tied].dim is not None:  # else it is full under this name too
            raise TPError(
                f"`{tied}` and `{name}` are one tied weight, but only the first is split (`{owners[tied].style.name}`), and "
                f"`{name}` is not covered by any rule. Tied embedding and head go together as `vocab_embedding` and `vocab_head`, or both as "
                "`replicate`."
            )
    left = [n for n in left if id(names.parameters[n]) not in by_id]
    if left:
        shown = ", ".join(f"`{n}` {tuple(names.parameters[n].shape)}" for n in left[:4])
        raise TPError(
            f"{len(left)} of {len(names.parameters)} parameters of {type(model).__name__} are not covered by any rule of the plan: {shown}"
            + (", .." if len(left) > 4 else "")
            + ". Give them a style; to replicate all that are left on every rank, say so with the rule `'**': 'replicate'`."
        )


def _refuse_tied_split_twice(entries: list[Entry], names: Names) -> None:
    first: dict[int, tuple[str, Split, Entry]] = {}
    for entry in entries:
        for name, split in entry.splits.items():
            before = first.setdefault(id(names.parameters[name]), (name, split, entry))
            if before[1] != split:
                raise TPError(
                    f"`{before[0]}` and `{name}` are one tied weight, but `{before[2].style.name}` and `{entry.style.name}` split it "
                    "in two ways. Tied embedding and head go together as `vocab_embedding` and `vocab_head`, or both as `replicate`."
                )
