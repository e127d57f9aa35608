"""From traces to a plan: which weights are split, which rank has which feature, what else has to change."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tp.comm import even_shard
from lightning_tp.dropout import without_dropout
from lightning_tp.errors import TPError
from lightning_tp.infer.classes import shrunk
from lightning_tp.infer.record import Found, Recorder, computed_unseen
from lightning_tp.infer.repeats import Alike, alike_blocks, blocks_once, followed, for_all
from lightning_tp.infer.restore import Weightless, garbage_kept, has_more_than, modules_as_they_were
from lightning_tp.infer.sequence import CantBeInShards, with_sequence_parallel
from lightning_tp.infer.sizes import LocalInt
from lightning_tp.infer.trace import Trace, leaves, run
from lightning_tp.infer.trial import try_on_a_rank
from lightning_tp.plan import Plan, Rule
from lightning_tp.plan_check import INFERRED
from lightning_tp.plan_table import starred
from lightning_tp.styles import Colwise, Replicate, Rowwise, VocabEmbedding, VocabHead
from lightning_tp.styles.attention import readable_attention
from lightning_tp.styles.base import even_split, is_conv1d
from lightning_tp.styles.linear import CONVOLUTIONS
from lightning_tp.styles.local_ops import LocalOps, Pattern, ShardParameter

MOST_REAL = 5_000_000  # parameters, above which a model is followed without computing
TABLE = "a table is split by its rows"
MOST_RUNS = 24
MOST_SHARES = 2  # times that a further part of one fused weight is given to every rank
SMALL_OUTPUT = 8  # output features a rank, below which a layer is not split for memory alone
SMALL_SHARE = 200  # nor if all parameters are this many times as many
SMALL_CONVOLUTION = 30  # nor a convolution, if these are: small beside the picture that would be gathered, as a stem of patches is
SMALL_VOCAB = 64  # rows a rank, below which an embedding or a head is kept whole

Key = tuple[str, int]
Caller = Callable[[nn.Module, Any], Any]


def infer_plan(model: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...], tp: int) -> Plan:
    """Find how a model splits over `tp` ranks by running it, whatever its modules are called.

    Nothing is changed and nothing is sent: the forward runs in this process, on the model's own weights or on the meta device, and every
    feature of every weight is followed to where it is used.

    Args:
        model: any transformer; unsplit.
        inputs: what its forward is called with: a mapping of keyword arguments, or a tuple.
        tp: the number of ranks that share it.

    Returns:
        The plan, not yet checked against the model (`parallelize` does it).

    Raises:
        TPError: if the model can't be run, or nothing in it can be split.

    Example:
        >>> from torch import nn
        >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> {rule.pattern: rule.style.name for rule in infer_plan(mlp, (torch.zeros(2, 4, 8),), tp=2).rules}
        {'0': 'colwise', '2': 'rowwise', '**': 'replicate'}
    """
    return infer_by_call(model, call_with, dict(inputs) if isinstance(inputs, Mapping) else tuple(inputs), tp)


def call_with(model: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...]) -> Any:
    """The model's output for keyword or positional arguments."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def infer_by_call(model: nn.Module, call: Caller, inputs: Any, tp: int) -> Plan:
    """As `infer_plan`, for a model that runs by `call(model, inputs)`: a training step, for instance.

    Raises:
        TPError: as `infer_plan`.
    """
    if tp < 1:
        raise TPError(f"`tp={tp}`: the number of ranks that share one model is 1 or more.")
    with as_it_was(model), garbage_kept():
        if has_more_than(model, MOST_REAL):
            try:
                with Weightless(model) as twin:
                    return _infer(model, call, inputs, tp, twin.weights)
            except Exception:  # it decides by values, it may be: follow it on real ones
                pass
        try:
            return _infer(model, call, inputs, tp, nullcontext)
        except TPError:
            raise
        except Exception as error:
            raise TPError(
                f"Following the forward of {type(model).__name__} to find a plan ended with {type(error).__name__}: {error}. See that it runs "
                "on these inputs in one process, or give a plan (`plan=`)."
            ) from error


def _infer(model: nn.Module, call: Caller, inputs: Any, tp: int, weights: Any) -> Plan:
    with modules_as_they_were(model):
        alike = alike_blocks(model, call, inputs)
    try:
        return _found(model, call, inputs, tp, weights, alike)
    except Exception:
        if not alike:
            raise
    return _found(model, call, inputs, tp, weights, {})  # code around the blocks looks for what only each of them makes


def _found(model: nn.Module, call: Caller, inputs: Any, tp: int, weights: Any, alike: Alike) -> Plan:
    """The plan, from runs of the model as it stands; `weights()` is a context in which it has its weights, to try the plan."""

    ran: set[str] = set()

    def once(tracer: Any) -> Any:
        ran.clear()
        return blocks_once(model, tracer, alike, ran)

    names = {n: p for n, p in model.named_parameters()}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    whole: dict[Key, str] = {(n, 1): TABLE for n, p in names.items() if id(p) in tables}
    shared: dict[Key, Tensor] = {}
    names_stars = {starred(n) for n in names}
    tries: dict[str, int] = {}
    ungathered: set[str] = set()
    convolved: set[str] = set()
    for turn in range(MOST_RUNS + 1):
        if (
            turn == MOST_RUNS // 2
        ):  # a chain of convolutions and batch norms is given up one by one: not the rest of the model for it
            late = "whether its channels stay apart was not found in time"
            whole.update({(n, d): late for n in convolved for d in range(names[n].ndim)})
        if turn == MOST_RUNS:  # what is left is whole, and right
            whole.update({(n, d): "how its features are used could not be told" for n, p in names.items() for d in range(p.ndim)})
            shared = {}
        with readable_attention(model), modules_as_they_were(model):
            trace, out, tracer = run(model, call, inputs, set(whole), shared, during=once)
        convolved |= trace.convolved
        alike = {name: like for name, like in alike.items() if name not in ran}  # given other inputs, after all: to be followed
        escaped = _escaped(trace, out, tracer)
        if escaped and shared:
            shared, tries = {}, dict.fromkeys(names_stars, MOST_SHARES)
            continue
        bad = {k: "what every rank has of it meets what is whole" for k in trace.nodes} if escaped else _too_few(trace, tp, names)
        if bad and not escaped and _share(bad, trace, shared, names, tries):
            continue
        if bad:
            _demote(bad, whole, names, trace)
            continue
        owner = _owners(trace, tp)
        heads = _heads(model, trace, owner, out, tracer, tp)
        standard = _standard(model, trace, names)
        with readable_attention(model):
            found, sinks = _record(model, call, inputs, trace, set(whole), shared, owner, tp, standard, heads, once)
        bad = _broken(found, trace, owner, sinks, heads, tp)
        if not bad:
            plan = _plan(model, trace, owner, found, heads, standard, whole, tp, ungathered, alike)
            with readable_attention(model), modules_as_they_were(model):
                replan = partial(
                    _from_doors,
                    model,
                    call,
                    inputs,
                    trace,
                    whole,
                    shared,
                    owner,
                    tp,
                    standard,
                    heads,
                    ungathered,
                    plan,
                    once,
                    alike,
                )
                final = _with_sequence(model, call, inputs, plan, tp, replan, once, alike)
            with weights():
                failed = try_on_a_rank(model, call, inputs, final, tp, alike)
                if failed is not None and final != plan:
                    final, failed = plan, try_on_a_rank(model, call, inputs, plan, tp, alike)
            if failed is None or turn == MOST_RUNS or (not trace.nodes and "" in ungathered):
                return _explained(final, whole, names)
            ungathered.add(starred(failed[0]) if trace.nodes else "")
            bad = _inside(followed(failed[0], alike), failed[1], trace)
        _demote(bad, whole, names, trace)
    raise TPError(
        f"No plan for {type(model).__name__} was found in {MOST_RUNS} runs; the last weights that were given up: "
        f"{', '.join(n for n, _ in list(whole)[-3:])}. Give a plan (`plan=`)."
    )


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Leave buffers and random state as they were; drop nothing meanwhile: runs are compared."""
    buffers = {n: b.clone() for n, b in model.named_buffers() if not b.is_meta}
    state = torch.get_rng_state()
    try:
        with without_dropout():
            yield
    finally:
        torch.set_rng_state(state)
        with torch.no_grad():
            for n, b in model.named_buffers():
                if n in buffers and b.shape == buffers[n].shape:
                    b.copy_(buffers[n])


def _inside(where: str, why: str, trace: Trace) -> dict[Key, str]:
    """The weights that are split for a module whose code raised on a rank, or, if there are none, around it."""
    while True:
        used = {u.name for u in trace.uses if not where or u.module == where or u.module.startswith(f"{where}.")}
        bad = {k: f"`{starred(where) or 'the model'}` does not run on shards ({why})" for k in _out_keys(trace) if k[0] in used}
        if bad or not where:
            return bad or {k: f"the model does not run on shards ({why})" for k in trace.nodes}
        where = where.rpartition(".")[0]


# ------------------------------------------------------------------------------------------------------- what to split


def _out_keys(trace: Trace) -> dict[Key, None]:
    return {(u.name, u.dim): None for u in trace.uses if u.kind in ("out", "along")}


def _kinds(trace: Trace, key: Key, piece: Tensor | None = None) -> list[tuple[int, Tensor]]:
    """The classes of a weight's features, in order, by how many of its features each has: (1, single features), (16, heads)."""
    nodes = trace.nodes[key]
    reps = trace.classes.find(nodes if piece is None else nodes[piece])
    reps = reps[reps > 0]
    if not reps.numel():
        return []
    classes, inverse, counts = torch.unique(reps, return_inverse=True, return_counts=True)
    first = torch.full((classes.numel(),), reps.numel()).scatter_reduce_(0, inverse, torch.arange(reps.numel()), "amin")
    order = first.argsort()
    return [(n, classes[order][counts[order] == n]) for n in counts.unique().tolist()]


def _too_few(trace: Trace, tp: int, names: dict[str, Any]) -> dict[Key, str]:
    """Weights to keep whole, because what they are joined to has fewer parts than ranks: of each such group the smallest."""
    outs = _out_keys(trace)
    first = {(u.name, u.dim) for u in trace.uses if u.kind == "out"}  # others may do without those that they go along with
    dims: dict[str, set[int]] = defaultdict(set)
    for name, dim in trace.nodes:
        dims[name].add(dim)
    for name, of in dims.items():
        if len(of) > 1:
            return {(name, d): "used by its rows here and by its columns there" for d in of}
    group_of: dict[int, list[Key]] = defaultdict(list)
    bad_classes: set[int] = set()
    for key in trace.nodes:
        for _, kind in _kinds(trace, key):
            if kind.numel() < tp:
                bad_classes.update(kind.tolist())
                for c in kind.tolist():
                    group_of[c].append(key)
    bad: dict[Key, str] = {}
    for c in bad_classes:
        members = [k for k in group_of[c] if k in first] or [k for k in group_of[c] if k in outs] or group_of[c]
        smallest = min(names[n].shape[d] for n, d in members)
        for n, d in members:
            if names[n].shape[d] == smallest:
                bad[n, d] = _why_together(trace, (n, d), tp)
    return bad


def _why_together(trace: Trace, key: Key, tp: int) -> str:
    """Which operation joined the features of a weight for the last time."""
    find = trace.classes.find
    mine = set(find(trace.nodes[key]).tolist())
    joins = trace.classes.joins
    roots = find(torch.tensor([feature for feature, _ in joins], dtype=torch.int64)).tolist()
    by = next((why for root, (_, why) in zip(reversed(roots), reversed(joins), strict=True) if root in mine), "its use")
    return f"{starred(by)} needs its features together, in fewer than tp={tp} parts"


def _share(bad: dict[Key, str], trace: Trace, shared: dict[Key, Tensor], names: dict[str, Any], tries: dict[str, int]) -> bool:
    """Of one fused weight, give every rank the part that all others are joined by: the keys and values of few heads.

    Found as the smallest factor of a product of activations that is made by a part of the weight only.
    """
    outs = [k for k in bad if k in _out_keys(trace)]
    changed = False
    for key in outs:
        nodes = trace.nodes[key]
        if len({starred(k[0]) for k in outs}) > 1:
            continue
        parts = [torch.isin(nodes, of) & (nodes > 0) for of in trace.operands]
        parts = [p for p in parts if bool(p.any()) and int(p.sum()) < int((nodes > 0).sum())]
        if not parts:
            continue
        smallest = min(parts, key=lambda p: int(p.sum()))
        if int(smallest.sum()) * 2 > int((nodes > 0).sum()):
            continue  # most of it would be whole
        star = starred(key[0])
        tries[star] = tries.get(star, 0) + 1
        if tries[star] > MOST_SHARES:
            for k in [k for k in shared if starred(k[0]) == star]:
                del shared[k]
            continue
        for n in names:
            if starred(n) == star and names[n].shape[key[1]] == nodes.numel():
                shared[n, key[1]] = shared.get((n, key[1]), torch.zeros_like(smallest)) | smallest
        changed = True
        break
    return changed


def _escaped(trace: Trace, out: Any, tracer: Any) -> bool:
    """Whether something that every rank has beside its shards, each with its share of the gradient, is used as a whole elsewhere."""
    labels = [tracer.shadow(t).label for t in leaves(out)]
    return bool(trace.escaped) or any(x is not None and not bool(shrunk(x).any()) for x in labels)


def _demote(bad: dict[Key, str], whole: dict[Key, str], names: dict[str, Any], trace: Trace) -> None:
    """Keep these weights whole, and those of the blocks alike: not those of other widths, as the stages of a pyramid have."""
    if all(key in whole for key in bad):  # no step ahead: give up all
        bad = {k: "how its features are used could not be told" for k in trace.nodes}
    stars = {(starred(n), names[n].shape, d): why for (n, d), why in bad.items()}
    for n in names:
        for d in range(names[n].ndim):
            if (starred(n), names[n].shape, d) in stars:
                whole[n, d] = stars[starred(n), names[n].shape, d]


def _members(trace: Trace) -> Tensor:
    """For each class a number that tells how many features of which weights are in it: equal where these are."""
    members = torch.zeros(trace.classes.parent.numel(), dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    for nodes in trace.nodes.values():
        found = trace.classes.find(nodes)
        factor = torch.randint(2**62, (), generator=generator)
        members.scatter_add_(0, found, factor.expand(found.shape))  # it may wrap around
    return members


def _told_apart(kind: Tensor, members: Tensor, tp: int) -> list[Tensor]:
    """Classes of one size that are not of the same weights (heads of two branches in one fused weight) are dealt out each by itself."""
    of = members[kind]
    parts = [kind[of == m] for m in dict.fromkeys(of.tolist())]
    return parts if all(p.numel() >= tp for p in parts) else [kind]


def _owners(trace: Trace, tp: int) -> Tensor:
    """The rank of each feature: classes of one kind are dealt out evenly, in order."""
    of_class = torch.full((trace.classes.parent.numel(),), -1)
    members = _members(trace)
    for key in trace.nodes:
        pieces: list[Tensor | None] = [*trace.pieces.get(key, ())] or [None]  # each is dealt out by itself
        kinds = [kind for piece in pieces for kind in _kinds(trace, key, piece)]
        for per_class, kind in [(n, part) for n, whole in kinds for part in _told_apart(whole, members, tp)]:
            new = kind[of_class[kind] < 0]
            n = new.numel()
            if per_class == 1:  # as torch.chunk cuts
                shards = [len(even_shard(n, r, tp)) for r in range(tp)]
            else:
                shards = [(r + 1) * n // tp - r * n // tp for r in range(tp)]
            of_class[new] = torch.repeat_interleave(torch.arange(tp), torch.tensor(shards))
    owner = of_class[trace.classes.find(torch.arange(of_class.numel()))]
    owner[0] = -1
    return owner


def _heads(model: nn.Module, trace: Trace, owner: Tensor, out: Any, tracer: Any, tp: int) -> dict[str, int]:
    """Weights whose features reach the model's output or its loss one by one: the logits. name -> vocabulary."""
    labels = [tracer.shadow(t).label for t in leaves(out)]
    reached = [shrunk(label).unique() for label in [*labels, *trace.logits] if label is not None]
    seen = torch.cat(reached).unique() if reached else torch.zeros(0, dtype=torch.int64)
    heads = {}
    outs = _out_keys(trace)
    for (name, dim), nodes in trace.nodes.items():
        if name in trace.convolved:
            continue  # pictures, not logits along the last dim
        if (name, dim) in outs and bool(torch.isin(nodes[:1], seen)) and bool(torch.isin(nodes, seen).all()):
            heads[name] = nodes.numel()
    return heads


def _standard(model: nn.Module, trace: Trace, names: dict[str, Any]) -> dict[str, str]:
    """Modules that a style runs: weight name -> module name, for linear layers that run their own class's forward."""
    standard = {}
    by_module: dict[str, set[str]] = defaultdict(set)
    for use in trace.uses:
        by_module[use.name].add(use.module)
    for name, modules in by_module.items():
        if len(modules) != 1:
            continue
        owner_name = next(iter(modules))
        module = model.get_submodule(owner_name)
        if getattr(module, "weight", None) is not names[name]:
            continue
        if (isinstance(module, nn.Linear) and _runs_torchs_code(module)) or is_conv1d(module):
            standard[name] = owner_name
    return standard


def _record(
    model: nn.Module,
    call: Caller,
    inputs: Any,
    trace: Trace,
    whole: set[Key],
    shared: dict[Key, Tensor],
    owner: Tensor,
    tp: int,
    standard: dict[str, str],
    heads: dict[str, int],
    once: Any,
    doors: Any = None,
) -> tuple[Found, list[Tensor]]:
    recorders: list[Recorder] = []
    whole_reads: set[Any] = set()

    owners, owner = owner, owner.clone()
    tables = {n for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    for (name, _), nodes in trace.nodes.items():
        if name in heads:
            owner[nodes] = -1  # logits show their whole shape, and take care of themselves

    def make(tracer: Any) -> Recorder:
        by_call = {n: v for n, v in heads.items() if n not in standard}
        tracer.owner = owner
        tracer.known = {(u.name, u.dim, u.kind) for u in trace.uses}
        recorders.append(Recorder(tracer, owner, tp, set(standard.values()), by_call, trace.nodes, whole_reads))
        recorders[-1].param_owner, recorders[-1].tables, recorders[-1].tried = owners, tables, trace.tried
        recorders[-1].mixed = recorders[-1].found.mixed = set(trace.local_uses) & set(trace.whole_uses)
        recorders[-1].outside = set(trace.whole_uses) - set(trace.local_uses)
        if doors is not None:
            doors(tracer)
        return recorders[-1]

    while True:
        with modules_as_they_were(model):
            _, out, tracer = run(model, call, inputs, whole, shared, make, during=once)
        recorder = recorders[-1]
        if LocalInt.diverging - whole_reads:
            whole_reads |= LocalInt.diverging
        elif unseen := computed_unseen(model, call, inputs, whole, shared, make, once, recorder, tracer):
            whole_reads |= unseen
        else:
            break
    outputs = [tracer.shadow(t).label for t in leaves(out)]
    recorder.found.local_uses, recorder.found.trace = tracer.trace.local_uses, tracer.trace
    return recorder.found, [x for x in outputs if x is not None]


def _broken(found: Found, trace: Trace, owner: Tensor, sinks: list[Tensor], heads: dict[str, int], tp: int) -> dict[Key, str]:
    """Weights to keep whole, because a call can't work on their shards, or their features leave the model split."""
    bad: dict[Key, str] = {}
    for label, why in found.broken:
        for key in _made_by(label, trace):
            bad[key] = why
    for name, vocab in heads.items():
        if vocab < SMALL_VOCAB * tp:
            bad.update({k: "a small output" for k in trace.nodes if k[0] == name})
    shown = [trace.classes.find(nodes) for (name, _), nodes in trace.nodes.items() if name in heads]
    if shown:  # what the model gives shows as whole, to the weights that read it, too
        classes, outs = torch.cat(shown).unique(), _out_keys(trace)
        for key, nodes in trace.nodes.items():
            if key not in outs and bool(torch.isin(trace.classes.find(nodes), classes).any()):
                bad[key] = "it reads an output of the model, which is whole"
    for label in sinks:
        for key in _made_by(label, trace):
            if key[0] not in heads:
                bad[key] = "its features leave the model"
    return bad


def _made_by(label: Tensor, trace: Trace) -> list[Key]:
    present = shrunk(label).unique()
    classes = trace.classes.find(present[present > 0]).unique()
    return [k for k in _out_keys(trace) if bool(torch.isin(trace.classes.find(trace.nodes[k]), classes).any())]


# ------------------------------------------------------------------------------------------------------------ the plan


def _plan(
    model: nn.Module,
    trace: Trace,
    owner: Tensor,
    found: Found,
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
                rules.append(Rule(where, VocabHead(input="replicate"), "its logits stay split for the loss"))
            elif kind == "out":
                rules.append(Rule(where, Colwise(input="replicate", ranges=ranges), why))
            else:
                rules.append(Rule(where, Rowwise(input="width", output="replicate", ranges=ranges), why))
        elif not (name in heads and _table(model, names[name])):
            rules.append(Rule(name, ShardParameter(dim, ranges), why or "split where it is used"))
    split_modules = {r.pattern for r in rules}
    # a layer whose output is gathered at once saves memory only: beside layers that work together, not instead of them
    gathered = list(_gathered(model, trace, names, whole, tp, ungathered)) if rules else []
    rules += gathered
    rules += _embeddings(model, trace, heads, {id(model.get_submodule(r.pattern).weight) for r in gathered}, names, tp)
    for module, calls in found.calls.items():
        if any(c.changes for c in calls):
            rules.append(Rule(module, LocalOps(_needed(calls)), "whole sizes in its code"))
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
            rules.append(Rule(name, Replicate(partial_grad=True), "works on split activations"))
    rules = for_all(rules, alike)
    rules += _aliases(model, trace, rules, names, owner, heads, standard, tp)
    rules.append(Rule("**", Replicate(partial_grad=False)))
    return Plan(rules, source=INFERRED)


def _aliases(
    model: nn.Module,
    trace: Trace,
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
        if isinstance(rule.style, Colwise) and rule.style.output == "replicate":  # its output is gathered
            module = model.get_submodule(rule.pattern)
            for p in (module.weight, module.bias):
                if isinstance(p, Tensor):
                    split[id(p)] = (0, even_split(p.shape[0], 0, tp).ranges)
    named = [r.pattern for r in rules if r.style.splits_parameters]
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) in split and not any(name == n or name.startswith(f"{n}.") for n in named):
            yield Rule(name, ShardParameter(*split[id(p)]), "another name of a split parameter")


def _from_doors(
    model: nn.Module,
    call: Caller,
    inputs: Any,
    trace: Trace,
    whole: dict[Key, str],
    shared: dict[Key, Tensor],
    owner: Tensor,
    tp: int,
    standard: dict[str, str],
    heads: dict[str, int],
    ungathered: set[str],
    plan: Plan,
    once: Any,
    alike: Alike,
    doors: Callable[[Any], None],
) -> tuple[Plan, Found]:
    """The plan as it is where some modules are given a stream of which each rank has a share of the gradient; see `sequence.py`."""
    found, sinks = _record(model, call, inputs, trace, set(whole), shared, owner, tp, standard, heads, once, doors)
    assert found.trace is not None
    for (weight, _), why in _broken(found, trace, owner, sinks, heads, tp).items():
        raise CantBeInShards(f"{weight}: {why}", {weight.rpartition(".")[0]})
    if any(not bool(shrunk(x).any()) for x in sinks):
        raise CantBeInShards("a share of a gradient leaves the model")
    gathers = {r.pattern for r in plan.rules if isinstance(r.style, Colwise) and r.style.output == "replicate"}
    for where in [n for n, _ in model.named_modules() if any(Rule(g, "colwise").matches(n) for g in gathers)]:
        for name, _ in model.get_submodule(where).named_parameters(prefix=where):  # its output is whole again, whatever it reads
            for uses in (found.trace.local_uses, found.trace.whole_uses):
                uses.pop(name, None)
            found.trace.whole_uses.update({name: trace.whole_uses[name]} if name in trace.whole_uses else {})
    seen = replace(trace, local_uses=found.trace.local_uses, whole_uses=found.trace.whole_uses)
    return _plan(model, seen, owner, found, heads, standard, whole, tp, ungathered, alike), found


def _with_sequence(model: nn.Module, call: Caller, inputs: Any, plan: Plan, tp: int, replan: Any, once: Any, alike: Alike) -> Plan:
    rules = with_sequence_parallel(model, call, inputs, plan, tp, replan, once, alike).rules if tp > 1 else plan.rules
    everything = [n for n, _ in model.named_modules()] + list(dict(model.named_parameters(remove_duplicate=False)))
    catch_all = [r for r in rules if r.pattern == "**"]
    return Plan([*_folded([r for r in rules if r.pattern != "**"], everything), *catch_all], plan.source)


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
    pattern = Pattern(tuple(zip(ranks.tolist(), lengths.tolist(), strict=True)))
    return tuple(pattern.ranges(r) for r in range(tp))


def _readers(trace: Trace) -> dict[Key, str]:
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
    model: nn.Module, trace: Trace, names: dict[str, Any], whole: dict[Key, str], tp: int, ungathered: set[str]
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
                Colwise(input="replicate", output="replicate"),
                f"its output is gathered: {whole.get((name, 0), 'no split weight reads it')}",
            )


def _runs_torchs_code(module: nn.Module) -> bool:
    """Whether this is a linear layer or a convolution, and no class below has a forward of its own."""
    own = next((c for c in (nn.Linear, *CONVOLUTIONS) if isinstance(module, c)), None)
    methods = ("forward", "_conv_forward") if own in CONVOLUTIONS else ("forward",)
    return own is not None and all(getattr(getattr(type(module), m), "__code__", None) is getattr(own, m).__code__ for m in methods)


def _elsewhere(bias: Any, where: str, trace: Trace, names: dict[str, Any]) -> bool:
    name = next(n for n, p in names.items() if p is bias)
    return bool((trace.whole_uses.get(name, set()) | trace.local_uses.get(name, set())) - {where})


def _embeddings(
    model: nn.Module, trace: Trace, heads_by_name: dict[str, int], gathered: set[int], names: dict[str, Any], tp: int
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
            found.append(Rule(name, VocabEmbedding(output="replicate"), "rows of the vocabulary"))
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
        rules += [Rule(n, Replicate(partial_grad=False), why) for n in patterns]
    rules.append(Rule(rest.pattern, rest.style, f"no split features reach the rest; {others / max(total, 1):.2%} of the weights"))
    return Plan(rules, plan.source)
