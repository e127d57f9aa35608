"""Write the rules of a plan from the assignment of features."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tp.core.comm.axis import even_shard
from lightning_tp.core.comm.state import WIDTH, I, R
from lightning_tp.core.modules.blocks import starred
from lightning_tp.infer.assign import SMALL_VOCAB, TABLE, Key, _out_keys
from lightning_tp.infer.calls.recorder import CallChanges
from lightning_tp.infer.follow.trace import FeatureTrace
from lightning_tp.infer.repeats import Alike, for_all
from lightning_tp.plan.check import INFERRED
from lightning_tp.plan.plan import Plan
from lightning_tp.plan.rule import Rule
from lightning_tp.styles import Colwise, Replicate, RewrittenCalls, Rowwise, ShardParameter, VocabEmbedding, VocabHead
from lightning_tp.styles.linear import _runs_torchs_code
from lightning_tp.styles.split import Ownership, even_split

SMALL_OUTPUT = 8  # output features a rank, below which a layer is not split for memory alone


SMALL_SHARE = 200  # nor if all parameters are this many times as many


SMALL_CONVOLUTION = 30  # nor a convolution, if these are: small beside the picture that would be gathered, as a stem of patches is


def _plan(
    model: nn.Module,
    trace: FeatureTrace,
    owner: Tensor,
    found: CallChanges,
    heads: dict[str, int],
    standard: dict[str, str],
    whole: dict[Key, str],
    tp: int,
    ungathered: set[str],
    alike: Alike,
) -> Plan:
    names = {n: p for n, p in model.named_parameters()}
    readers = _readers(trace)
    rules: list[Rule] = []
    for (name, dim), nodes in trace.nodes.items():
        ranges = _ranges(owner[nodes], tp)
        kind = "out" if (name, dim) in _out_keys(trace) else "in"
        why = readers.get((name, dim), "")
        if name in standard:
            where = standard[name]
            if name in heads:
                rules.append(Rule(where, VocabHead(input=I), "its logits stay split for the loss"))
            elif kind == "out":
                rules.append(Rule(where, Colwise(input=I, ranges=ranges), why))
            else:
                rules.append(Rule(where, Rowwise(input=WIDTH, output=I, ranges=ranges), why))
        elif not (name in heads and _table(model, names[name])):
            rules.append(Rule(name, ShardParameter(dim, ranges), why or "split where it is used"))
    split_modules = {r.pattern for r in rules}
    # a layer whose output is gathered at once saves memory only: beside layers that work together, not instead of them
    gathered = list(_gathered(model, trace, names, whole, tp, ungathered)) if rules else []
    rules += gathered
    rules += _embeddings(model, trace, heads, {id(model.get_submodule(r.pattern).weight) for r in gathered}, names, tp)
    for module, calls in found.calls.items():
        if any(c.changes for c in calls):
            rules.append(Rule(module, RewrittenCalls(_needed(calls)), "whole sizes in its code"))
    taken = {r.pattern for r in rules}
    mixed = set(trace.local_uses) & set(trace.whole_uses)
    done = {id(names[n]) for n, _ in trace.nodes} | {id(getattr(model.get_submodule(m), "bias", None)) for m in standard.values()}
    for name in names:
        if (
            name in found.local_uses
            and name not in mixed
            and id(names[name]) not in done
            and not any(name == t or name.startswith(f"{t}.") for t in taken & split_modules)
        ):
            rules.append(Rule(name, Replicate(state=R), "works on split activations"))
    rules = for_all(rules, alike)
    rules += _aliases(model, trace, rules, names, owner, heads, standard, tp)
    rules.append(Rule("**", Replicate(state=I)))
    return Plan(rules, source=INFERRED)


def _aliases(
    model: nn.Module,
    trace: FeatureTrace,
    rules: list[Rule],
    names: dict[str, Any],
    owner: Tensor,
    heads: dict[str, int],
    standard: dict[str, str],
    tp: int,
) -> Iterator[Rule]:
    """Other names of split parameters, of modules that no rule names because nothing calls them."""
    split = {id(names[n]): (dim, _ranges(owner[nodes], tp)) for (n, dim), nodes in trace.nodes.items()}
    for (n, dim), nodes in trace.nodes.items():
        bias = getattr(model.get_submodule(standard[n]), "bias", None) if n in standard else None
        if bias is not None and (n, dim) in _out_keys(trace):
            split[id(bias)] = (0, _ranges(owner[nodes], tp))
    for rule in rules:
        if isinstance(rule.style, Colwise) and rule.style.output == I:  # its output is gathered
            module = model.get_submodule(rule.pattern)
            for p in (module.weight, module.bias):
                if isinstance(p, Tensor):
                    split[id(p)] = (0, even_split(p.shape[0], 0, tp).ranges)
    named = [r.pattern for r in rules if r.style.splits_parameters]
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) in split and not any(name == n or name.startswith(f"{n}.") for n in named):
            yield Rule(name, ShardParameter(*split[id(p)]), "another name of a split parameter")


def _folded(rules: list[Rule], everything: list[str]) -> list[Rule]:
    """One rule for the modules of all blocks that are alike."""
    groups: dict[tuple[str, str], list[Rule]] = defaultdict(list)
    for rule in rules:
        groups[starred(rule.pattern), rule.style.name].append(rule)
    folded = []
    for (star, _), of in groups.items():
        one = Rule(star, of[0].style, of[0].reason)
        alike = len({(r.style, r.reason) for r in of}) == 1
        if alike and len(of) > 1 and sum(one.matches(n) for n in everything) == len(of):
            folded.append(one)
        else:
            folded += of
    return folded


def _needed(calls: list[Any]) -> tuple[Any, ...]:
    """The calls that change, and those that stand at the same place and hold their turn."""
    places = {(c.name, c.at) for c in calls if c.changes}
    kept: dict[Any, list[Any]] = {}
    for c in calls:
        if (c.name, c.at) in places:
            kept.setdefault((c.name, c.at), []).append(c)
    return tuple(c for of in kept.values() for c in (of[:1] if all(c == of[0] for c in of) else of))


def _ranges(owner: Tensor, tp: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    ranks, lengths = torch.unique_consecutive(owner, return_counts=True)
    pattern = Ownership(tuple(zip(ranks.tolist(), lengths.tolist(), strict=True)))
    return tuple(pattern.ranges(r) for r in range(tp))


def _readers(trace: FeatureTrace) -> dict[Key, str]:
    """For each weight, what reads its features: "read by layers.*.o_proj on its split dim"."""
    outs = _out_keys(trace)
    keys = list(trace.nodes)
    read_by = torch.full((trace.classes.parent.numel(),), -1)  # class -> the last weight that ends it
    for i, key in enumerate(keys):
        if key not in outs:
            read_by[trace.classes.find(trace.nodes[key])] = i
    reasons = {}
    for key in keys:
        if key not in outs:
            reasons[key] = "ends split features; ranks add up"
            continue
        readers = read_by[trace.classes.find(trace.nodes[key])].unique().tolist()
        names = list(dict.fromkeys(starred(keys[i][0]) for i in readers if i >= 0))
        if names:
            reasons[key] = f"read by {', '.join(names[:2])} on its split dim"
    return reasons


def _gathered(
    model: nn.Module, trace: FeatureTrace, names: dict[str, Any], whole: dict[Key, str], tp: int, ungathered: set[str]
) -> Iterator[Rule]:
    """Large linear layers and convolutions whose features are needed together: split all the same, their output gathered."""
    split = {n for n, _ in trace.nodes}
    total = sum(p.numel() for p in names.values())
    modules = dict(model.named_modules())
    by_id = {id(p): n for n, p in names.items()}
    for where, module in modules.items():
        name = by_id.get(id(getattr(module, "weight", None)), "")
        if name in split or not name or not _runs_torchs_code(module) or getattr(module, "groups", 1) > 1:
            continue
        if any(not u or starred(where) == u or starred(where).startswith(f"{u}.") for u in ungathered):
            continue
        if where not in trace.whole_uses.get(name, ()):
            continue
        weight = module.weight
        tied = {n for n, m in modules.items() if isinstance(m, nn.Embedding) and m.weight is weight}
        if trace.whole_uses.get(name, set()) - tied != {where}:
            continue
        if (
            name in trace.local_uses
            or trace.looked_up.get(name, set()) - tied
            or (module.bias is not None and _elsewhere(module.bias, where, trace, names))
        ):
            continue
        if not len(even_shard(weight.shape[0], tp - 1, tp)):
            continue  # nothing for the last rank
        share = SMALL_SHARE if isinstance(module, nn.Linear) else SMALL_CONVOLUTION
        if weight.shape[0] >= (SMALL_OUTPUT * tp if split else tp) and (not split or weight.numel() * share >= total):
            yield Rule(
                where,
                Colwise(input=I, output=I),
                f"its output is gathered: {whole.get((name, 0), 'no split weight reads it')}",
            )


def _elsewhere(bias: Any, where: str, trace: FeatureTrace, names: dict[str, Any]) -> bool:
    name = next(n for n, p in names.items() if p is bias)
    return bool((trace.whole_uses.get(name, set()) | trace.local_uses.get(name, set())) - {where})


def _embeddings(
    model: nn.Module, trace: FeatureTrace, heads_by_name: dict[str, int], gathered: set[int], names: dict[str, Any], tp: int
) -> list[Rule]:
    """Embeddings of a large vocabulary are split by its rows; those tied to a head have to be."""
    heads = {id(names[n]) for n in heads_by_name} | gathered
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or module.max_norm or module.scale_grad_by_freq or module.sparse:
            continue
        tied = id(module.weight) in heads
        used = next((n for n, p in names.items() if p is module.weight), "")  # the first of its names
        elsewhere: set[str] = set()
        if not tied:
            elsewhere = (
                {u.module for u in trace.uses if u.name == used}
                | trace.whole_uses.get(used, set())
                | trace.local_uses.get(used, set())
            )
        if tied or (module.num_embeddings >= SMALL_VOCAB * tp and not elsewhere - {name} and trace.looked_up.get(used) == {name}):
            found.append(Rule(name, VocabEmbedding(output=I), "rows of the vocabulary"))
    return found


def _table(model: nn.Module, weight: Any) -> bool:
    return any(isinstance(m, nn.Embedding) and m.weight is weight for m in model.modules())


def _explained(plan: Plan, whole: dict[Key, str], names: dict[str, Any]) -> Plan:
    """The plan, with a rule and a reason for each kind of weight that was given up, and what it costs."""
    *rules, rest = plan.rules
    total = sum(p.numel() for p in names.values())
    left: dict[str, list[str]] = defaultdict(list)
    for name in names:
        ancestors = accumulate(name.split("."), lambda a, b: f"{a}.{b}")
        if not any(r.matches(a) for a in ancestors for r in rules if r.style.splits_parameters):
            left[starred(name)].append(name)

    def numel(of: list[str]) -> int:
        return sum(names[n].numel() for n in of)

    def reason(of: list[str]) -> str | None:
        why = next((whole[n, d] for n in of for d in range(names[n].ndim) if whole.get((n, d), TABLE) != TABLE), None)
        return None if why is None else f"{why}; {numel(of) / total:.2%} of the weights"

    for i, rule in enumerate(rules):  # what works inside the doors of a region is summed, and given up all the same
        why = reason([n for n in names if rule.matches(n)]) if isinstance(rule.style, Replicate) else None
        if why is not None:
            rules[i] = Rule(rule.pattern, rule.style, why)
    others = 0
    for star, of in left.items():
        why = reason(of)
        if why is None:
            others += numel(of)
            continue
        matches = [n for n in names if starred(n) == star]
        patterns = [star] if len(matches) == len(of) else of
        rules += [Rule(n, Replicate(state=I), why) for n in patterns]
    rules.append(Rule(rest.pattern, rest.style, f"no split features reach the rest; {others / max(total, 1):.2%} of the weights"))
    return Plan(rules, plan.source)
