"""Write the rules of a plan from an assignment of features: one for each weight, with the reason for it.

Every function here decides one kind of rule. `decisions` looks up the rule of each parameter: why it is sharded as it is, or replicated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tp.core.comm.axis import even_shard
from lightning_tp.core.comm.state import WIDTH, I, R
from lightning_tp.core.modules.blocks import enclosing, starred
from lightning_tp.infer.assign import SMALL_VOCAB, Assignment, Parameters, made_by_weight
from lightning_tp.infer.blocks.workload import Key, Workload
from lightning_tp.infer.calls.recorder import CallChanges
from lightning_tp.infer.follow.trace import FeatureTrace
from lightning_tp.infer.record import Recording
from lightning_tp.infer.sequence.rules import calls_in_turn
from lightning_tp.infer.tables import needs_full_table
from lightning_tp.plan.plan import Plan
from lightning_tp.plan.rule import CATCH_ALL, INFERRED, Rule
from lightning_tp.styles import Colwise, Replicate, RewrittenCalls, Rowwise, ShardParameter, VocabEmbedding, VocabHead
from lightning_tp.styles.linear import runs_torchs_code
from lightning_tp.styles.split import Ownership, Ranges, even_split

SMALL_OUTPUT = 8  # output features a rank, below which a layer is not sharded for memory alone
SMALL_SHARE = 200  # nor if the model has this many times its parameters
SMALL_CONVOLUTION = 30  # nor a convolution: small beside the picture that would be all-gathered, as a stem of patches is


def write_plan(
    workload: Workload, assignment: Assignment, recording: Recording, kept_whole: Mapping[Key, str], not_gathered: Collection[str]
) -> Plan:
    """Write the plan of an assignment.

    Args:
        recording: of a run with this assignment.
        kept_whole: why weights are not sharded.
        not_gathered: modules (numbers as stars) in which no layer is sharded only to have its output all-gathered; "": none of the model.
    """
    parameters = dict(workload.model.named_parameters())
    sharded = list(_sharded_weights(workload, assignment, parameters))
    may_gather = sharded and "" not in not_gathered
    gathered = list(_gathered_layers(workload, assignment.trace, parameters, kept_whole, not_gathered)) if may_gather else []
    rules = [*sharded, *gathered, *_embeddings(workload, assignment, parameters, gathered)]
    rules += _adapted_calls(recording.changes)
    rules += _applied_to_shards(workload.model, assignment, recording.trace, parameters, [r.pattern for r in sharded])
    rules += _beside_the_weight(workload, rules)
    rules = workload.blocks.expand_to_copies(rules)
    rules += _aliases(workload, assignment, parameters, rules)
    return Plan([*rules, Rule(CATCH_ALL, Replicate(state=I))], source=INFERRED)


def decisions(rules: Iterable[Rule], names: Iterable[str]) -> dict[str, Rule]:
    """Return for each parameter the rule that it is under, whose `reason` says why it is sharded so; the catch-all if there is no other."""
    covering = [r for r in rules if r.style.splits_parameters]
    covering.sort(key=lambda rule: rule.pattern == CATCH_ALL)  # last
    found = {}
    for name in names:
        holders = list(accumulate(name.split("."), lambda a, b: f"{a}.{b}"))
        found[name] = next(r for r in covering if any(r.matches(holder) for holder in holders))
    return found


def _sharded_weights(workload: Workload, assignment: Assignment, parameters: Parameters) -> Iterator[Rule]:
    """Column-wise is a weight that makes features, row-wise one that reads the features of another."""
    trace, outs, tp = assignment.trace, made_by_weight(assignment.trace), workload.tp
    reasons = _readers(trace)
    for (name, dim), nodes in trace.nodes.items():
        ranges = _ranges(assignment.owner[nodes], tp)
        reason = reasons.get((name, dim), "")
        layer = assignment.layers.get(name)
        if layer is not None and name in assignment.logits:
            yield Rule(layer, VocabHead(input=I), "vocab-parallel logits (loss parallelism)")
        elif layer is not None and (name, dim) in outs:
            yield Rule(layer, Colwise(input=I, ranges=ranges), reason)
        elif layer is not None:
            yield Rule(layer, Rowwise(input=WIDTH, output=I, ranges=ranges), reason)
        elif not (name in assignment.logits and _is_embedding(workload.model, parameters[name])):
            yield Rule(name, ShardParameter(dim, ranges), reason or "sharded where it is used")


def _readers(trace: FeatureTrace) -> dict[Key, str]:
    """Say of each weight what becomes of its features; nothing of one whose features no other weight reads."""
    outs, keys = made_by_weight(trace), list(trace.nodes)
    reader = torch.full((trace.classes.parent.numel(),), -1)  # set of features -> the last weight that reads it
    for i, key in enumerate(keys):
        if key not in outs:
            reader[trace.classes.find(trace.nodes[key])] = i
    reasons = {}
    for key in keys:
        if key not in outs:
            reasons[key] = "row-parallel: partial sums are reduced (all-reduce / reduce-scatter)"
            continue
        readers = reader[trace.classes.find(trace.nodes[key])].unique().tolist()
        layers = list(dict.fromkeys(starred(keys[i][0]).removesuffix(".weight") for i in readers if i >= 0))
        if layers:
            reasons[key] = f"output feeds the row-parallel {', '.join(f'`{name}`' for name in layers[:2])}"
    return reasons


def _ranges(owner: Tensor, tp: int) -> tuple[Ranges, ...]:
    """Return for each rank the (start, stop) ranges of the indices that it owns."""
    ranks, lengths = torch.unique_consecutive(owner, return_counts=True)
    pattern = Ownership(tuple(zip(ranks.tolist(), lengths.tolist(), strict=True)))
    return tuple(pattern.ranges(r) for r in range(tp))


def _is_embedding(model: nn.Module, weight: Any) -> bool:
    return any(isinstance(m, nn.Embedding) and m.weight is weight for m in model.modules())


def _gathered_layers(
    workload: Workload, trace: FeatureTrace, parameters: Parameters, kept_whole: Mapping[Key, str], not_gathered: Collection[str]
) -> Iterator[Rule]:
    """Large linear layers and convolutions whose features are needed together are sharded for memory, and their output is all-gathered."""
    sharded = {n for n, _ in trace.nodes}
    name_of = {id(p): n for n, p in parameters.items()}
    total = sum(p.numel() for p in parameters.values())
    for where, module in workload.model.named_modules():
        name = name_of.get(id(getattr(module, "weight", None)), "")
        if not name or name in sharded or not runs_torchs_code(module) or getattr(module, "groups", 1) > 1:
            continue
        if enclosing(starred(where), not_gathered) or _used_elsewhere(
            workload.model, module, where, name, trace, name_of, workload.tp
        ):
            continue
        if _is_large(module, total, workload.tp):
            reason = f"output all-gathered: {kept_whole.get((name, 0), 'no row-parallel weight reads it')}"
            yield Rule(where, Colwise(input=I, output=I), reason)


def _used_elsewhere(
    model: nn.Module, module: nn.Module, where: str, name: str, trace: FeatureTrace, name_of: Mapping[int, str], tp: int
) -> bool:
    """Whether a layer did not run on full activations, or its weight or bias is used in another place, too; a tied embedding is none."""
    full, local = trace.whole_uses, trace.local_uses
    if where not in full.get(name, ()) or name in local:
        return True
    tables = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Embedding) and m.weight is module.weight]
    if any(needs_full_table(m, tp) for _, m in tables):
        return True
    tied = {n for n, _ in tables}
    bias = name_of.get(id(module.bias), "")
    users_of_bias = full.get(bias, set()) | local.get(bias, set())
    return bool((full[name] - tied - {where}) or (trace.looked_up.get(name, set()) - tied) or (users_of_bias - {where}))


def _is_large(module: nn.Module, total: int, tp: int) -> bool:
    """Whether sharding a layer for memory is worth an all-gather of its output, in a model of `total` parameters."""
    weight: Any = module.weight
    share = SMALL_SHARE if isinstance(module, nn.Linear) else SMALL_CONVOLUTION
    some_for_the_last_rank = len(even_shard(weight.shape[0], tp - 1, tp)) > 0
    return bool(some_for_the_last_rank and weight.shape[0] >= SMALL_OUTPUT * tp and weight.numel() * share >= total)


def _embeddings(workload: Workload, assignment: Assignment, parameters: Parameters, gathered: Iterable[Rule]) -> Iterator[Rule]:
    """Embeddings of a large vocabulary are sharded by its rows; those tied to a sharded head have to be."""
    trace = assignment.trace
    heads = {id(parameters[n]) for n in assignment.logits} | {id(workload.model.get_submodule(r.pattern).weight) for r in gathered}
    for where, module in workload.model.named_modules():
        if not isinstance(module, nn.Embedding) or module.max_norm or module.scale_grad_by_freq or module.sparse:
            continue
        if id(module.weight) not in heads:
            name = next((n for n, p in parameters.items() if p is module.weight), "")
            users = {u.module for u in trace.uses if u.name == name}
            users |= trace.whole_uses.get(name, set()) | trace.local_uses.get(name, set())
            only_looked_up = not users - {where} and trace.looked_up.get(name) == {where}
            if not only_looked_up or module.num_embeddings < SMALL_VOCAB * workload.tp or needs_full_table(module, workload.tp):
                continue
        yield Rule(where, VocabEmbedding(output=I), "vocab-parallel embedding")


def _adapted_calls(changes: CallChanges) -> Iterator[Rule]:
    """Calls in the code of modules that would be wrong on shards get local sizes and operands."""
    for module, calls in changes.calls.items():
        if places := {(c.name, c.at[:1]) for c in calls if c.changes}:
            at_places = [
                c for c in calls if (c.name, c.at[:1]) in places
            ]  # who calls the code around a place may make a difference
            yield Rule(
                module, RewrittenCalls(calls_in_turn(at_places)), "code that assumes full tensors, adapted to the local shard"
            )


def _applied_to_shards(
    model: nn.Module, assignment: Assignment, trace: FeatureTrace, parameters: Parameters, sharded: Container[str]
) -> Iterator[Rule]:
    """Replicated parameters that are applied to sharded activations get a part of their gradient on each rank."""
    styled = {id(parameters[n]) for n, _ in assignment.trace.nodes}
    styled |= {id(getattr(model.get_submodule(layer), "bias", None)) for layer in assignment.layers.values()}
    for name, p in parameters.items():
        if name in trace.local_uses and name not in assignment.mixed and id(p) not in styled and name not in sharded:
            yield Rule(name, Replicate(state=R), "applied to sharded activations: its gradient is summed over ranks")


def _beside_the_weight(workload: Workload, rules: list[Rule]) -> list[Rule]:
    """Parameters of a layer's subclass, or of modules in it, that the style of the layer does not split."""
    names = dict(workload.model.named_parameters(remove_duplicate=False))
    modules = dict(workload.model.named_modules())
    layers = [r for r in rules if isinstance(r.style, (Colwise, Rowwise, VocabEmbedding, VocabHead)) and r.pattern in modules]
    split = {f"{r.pattern}.{n}" for r in layers for n in r.style.splits(modules[r.pattern], r.pattern, workload.tp)}
    split |= {r.pattern for r in rules if r.style.splits_parameters}
    inside = {r.pattern for r in layers}
    return [Rule(n, Replicate(state=I), "its layer does not split it") for n in names if n not in split and enclosing(n, inside)]


def _aliases(workload: Workload, assignment: Assignment, parameters: Parameters, rules: Iterable[Rule]) -> list[Rule]:
    """Other names of sharded parameters, of modules that no rule names because nothing calls them."""
    model, tp, trace = workload.model, workload.tp, assignment.trace
    outs = made_by_weight(trace)
    shards: dict[int, tuple[int, tuple[Ranges, ...]]] = {}
    for (name, dim), nodes in trace.nodes.items():
        ranges = _ranges(assignment.owner[nodes], tp)
        shards[id(parameters[name])] = dim, ranges
        bias = getattr(model.get_submodule(assignment.layers[name]), "bias", None) if name in assignment.layers else None
        if bias is not None and (name, dim) in outs:
            shards[id(bias)] = 0, ranges
    for rule in rules:
        if isinstance(rule.style, VocabEmbedding) or (isinstance(rule.style, Colwise) and rule.style.output == I):
            module = model.get_submodule(rule.pattern)
            given = [p for p in (module.weight, getattr(module, "bias", None)) if isinstance(p, Tensor)]
            shards.update({id(p): (0, even_split(p.shape[0], 0, tp).ranges) for p in given})
    named = [r.pattern for r in rules if r.style.splits_parameters]
    return [
        Rule(name, ShardParameter(*shards[id(p)]), "another name of a sharded parameter")
        for name, p in model.named_parameters(remove_duplicate=False)
        if id(p) in shards and not enclosing(name, named)
    ]


def fold(rules: Iterable[Rule], model: nn.Module) -> list[Rule]:
    """Write one rule for the modules of all repeated blocks, where theirs are equal; the catch-all comes last."""
    everything = [n for n, _ in model.named_modules()] + list(dict(model.named_parameters(remove_duplicate=False)))
    groups: dict[tuple[str, str], list[Rule]] = defaultdict(list)
    for rule in rules:
        groups[starred(rule.pattern), rule.style.name].append(rule)
    catch_all = groups.pop((CATCH_ALL, Replicate.name), [])
    folded = []
    for (star, _), group in groups.items():
        one = Rule(star, group[0].style, group[0].reason)
        equal = len({(r.style, r.reason) for r in group}) == 1
        folded += [one] if equal and len(group) > 1 and sum(one.matches(n) for n in everything) == len(group) else group
    return [*folded, *catch_all]


def explained(plan: Plan, kept_whole: Mapping[Key, str], parameters: Parameters) -> Plan:
    """Return the plan with a rule and a reason for each kind of weight that can't be sharded, and what share of the parameters that is."""
    *rules, catch_all = plan.rules
    total = max(sum(p.numel() for p in parameters.values()), 1)

    def share(group: Iterable[str]) -> str:
        return f"{sum(parameters[n].numel() for n in group) / total:.2%} of the parameters"

    def reason(group: Collection[str]) -> str | None:
        why = next((kept_whole[n, d] for n in group for d in range(parameters[n].ndim) if (n, d) in kept_whole), None)
        return None if why is None else f"{why}; {share(group)}"

    for i, rule in enumerate(rules):  # a replicated parameter of a sharded region may be one that could not be sharded
        if isinstance(rule.style, Replicate):
            rules[i] = Rule(rule.pattern, rule.style, reason([n for n in parameters if rule.matches(n)]) or rule.reason)
    uncovered: dict[str, list[str]] = defaultdict(list)
    for name, rule in decisions(plan.rules, parameters).items():
        if rule is catch_all:
            uncovered[starred(name)].append(name)
    rest: list[str] = []
    for star, group in uncovered.items():
        why = reason(group)
        if why is None:
            rest += group
            continue
        every = [n for n in parameters if Rule(star, Replicate()).matches(n)]
        rules += [Rule(n, Replicate(state=I), why) for n in ([star] if len(every) == len(group) else group)]
    return Plan(
        [*rules, Rule(CATCH_ALL, catch_all.style, f"replicated: its input is not sharded; such weights are {share(rest)}")],
        plan.source,
    )
