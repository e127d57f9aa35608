"""Assign features to ranks: which weights can't be sharded, and why; which rank has which feature of the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_tp.core.comm.axis import even_shard
from lightning_tp.core.modules.blocks import enclosing, starred
from lightning_tp.infer.blocks.workload import Key, TracedRun, Workload
from lightning_tp.infer.calls.recorder import CallChanges
from lightning_tp.infer.follow.features import shrunk
from lightning_tp.infer.follow.trace import FeatureTrace
from lightning_tp.styles.base import is_conv1d
from lightning_tp.styles.linear import runs_torchs_code

SMALL_VOCAB = 64  # rows a rank, below which an embedding or a head is not sharded

LEAKED = "the part of it that every rank has gets partial gradients, and is used where gradients are full"
Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Assignment:
    """The rank of each feature, and what the weights are that have them."""

    trace: FeatureTrace  # the features, of the run that this is made from
    whole: frozenset[Key]  # weights that make no features: every rank has all of them
    shared: Mapping[Key, Tensor]  # which features of a weight every rank has
    owner: Tensor  # feature -> its rank, -1 for a feature that every rank has; feature 0 is none
    logits: Mapping[str, int]  # weights whose features reach the model's output or its loss one by one -> the vocabulary's size
    layers: Mapping[str, str]  # weights of linear layers that a style runs -> the name of that module

    @property
    def mixed(self) -> set[str]:
        """Parameters that meet sharded and full activations: their gradient is summed where they meet sharded ones."""
        return set(self.trace.local_uses) & set(self.trace.whole_uses)


def assign(
    workload: Workload, run: TracedRun, whole: frozenset[Key], shared: Mapping[Key, Tensor], parameters: Parameters
) -> Assignment:
    """Deal the features of a run out to ranks; every set of features that belong together goes to one of them."""
    trace = run.trace
    owner = owners(trace, workload.tp)
    return Assignment(trace, whole, dict(shared), owner, logits_of(run), styled_layers(workload.model, trace, parameters))


def made_by_weight(trace: FeatureTrace) -> dict[Key, None]:
    """Return the weights that make features, by (parameter, dim): column-wise. The others of `trace.nodes` read features: row-wise."""
    return {(u.name, u.dim): None for u in trace.uses if u.kind in ("out", "along")}


def leaks_partial_gradients(run: TracedRun) -> bool:
    """Return whether something that every rank has beside its shards, each with a part of its gradient, is used as if all had all of it."""
    return bool(run.trace.leaked_partial) or any(not bool(shrunk(label).any()) for label in run.outputs)


def sets_smaller_than_tp(trace: FeatureTrace, tp: int, parameters: Parameters) -> dict[Key, str]:
    """Return weights that can't be sharded, and why: those whose features form fewer sets than there are ranks.

    Of the weights that have features in such a set only the smallest are named; without them the others may have enough.
    """
    dims: dict[str, set[int]] = defaultdict(set)
    for name, dim in trace.nodes:
        dims[name].add(dim)
    for name, used in dims.items():
        if len(used) > 1:
            return {(name, d): "one of its uses would shard its rows, another its columns" for d in used}
    outs = made_by_weight(trace)
    independent = {(u.name, u.dim) for u in trace.uses if u.kind == "out"}  # others only go along with what they read
    weights_of: dict[int, list[Key]] = defaultdict(list)  # set of features, of a kind that has fewer sets than ranks -> weights
    for key in trace.nodes:
        for _, sets in _sets_by_size(trace, key):
            for s in sets.tolist() if sets.numel() < tp else ():
                weights_of[s].append(key)
    refused: dict[Key, str] = {}
    for sharers in weights_of.values():
        keys = [k for k in sharers if k in independent] or [k for k in sharers if k in outs] or sharers
        smallest = min(parameters[n].shape[d] for n, d in keys)
        refused.update({(n, d): why_joined(trace, (n, d)) for n, d in keys if parameters[n].shape[d] == smallest})
    return refused


def _sets_by_size(trace: FeatureTrace, key: Key, piece: Tensor | None = None) -> list[tuple[int, Tensor]]:
    """Return the sets that a weight has features in, in order, by how many it has in each: (1, single features), (16, heads of 16)."""
    nodes = trace.nodes[key]
    sets = trace.classes.find(nodes if piece is None else nodes[piece])
    sets = sets[sets > 0]
    if not sets.numel():
        return []
    unique, inverse, counts = torch.unique(sets, return_inverse=True, return_counts=True)
    first = torch.full((unique.numel(),), sets.numel()).scatter_reduce_(0, inverse, torch.arange(sets.numel()), "amin")
    order = first.argsort()
    return [(n, unique[order][counts[order] == n]) for n in counts.unique().tolist()]


def why_joined(trace: FeatureTrace, key: Key) -> str:
    """Return which operation joined features of a weight last."""
    find = trace.classes.find
    own = set(find(trace.nodes[key]).tolist())
    joins = trace.classes.joins
    sets = find(torch.tensor([feature for feature, _ in joins], dtype=torch.int64)).tolist()
    operation = next((why for s, (_, why) in zip(reversed(sets), reversed(joins), strict=True) if s in own), "its use")
    return f"{starred(operation)} needs features from several ranks"


def factor_to_share(refused: Mapping[Key, str], trace: FeatureTrace) -> tuple[Key, Tensor] | None:
    """Find the part of one fused weight by which all other parts are joined: the keys and values of few heads.

    It is the smallest factor of a product of activations that is made by a part of the weight only. If every rank has it, the rest may
    be sharded.

    Returns:
        The weight, and a mask of its features; None without such a part, or if it is more than half of the weight.
    """
    outs = made_by_weight(trace)
    keys = [k for k in refused if k in outs]
    if len({starred(name) for name, _ in keys}) > 1:
        return None
    for key in keys:
        nodes = trace.nodes[key]
        masks = [torch.isin(nodes, factor) & (nodes > 0) for factor in trace.operands]
        total = int((nodes > 0).sum())
        masks = [m for m in masks if 0 < int(m.sum()) < total]
        smallest = min(masks, key=lambda m: int(m.sum()), default=None)
        if smallest is not None and 2 * int(smallest.sum()) <= total:
            return key, smallest
    return None


def refused_by_calls(assignment: Assignment, changes: CallChanges, outputs: tuple[Tensor, ...], tp: int) -> dict[Key, str]:
    """Return weights that can't be sharded, and why: a call can't work on their shards, or their features leave the model."""
    trace, outs = assignment.trace, made_by_weight(assignment.trace)
    refused: dict[Key, str] = {}
    for label, why in changes.broken:
        refused.update(dict.fromkeys(_makers(label, trace), why))
    for name, vocabulary in assignment.logits.items():
        if vocabulary < SMALL_VOCAB * tp:
            refused.update({k: "output too small to be worth sharding" for k in trace.nodes if k[0] == name})
    shown = [trace.classes.find(nodes) for (name, _), nodes in trace.nodes.items() if name in assignment.logits]
    if shown:
        sets = torch.cat(shown).unique()
        for key, nodes in trace.nodes.items():
            if key not in outs and bool(torch.isin(trace.classes.find(nodes), sets).any()):
                refused[key] = "it reads an output of the model, which has its full size"
    for label in outputs:
        refused.update({k: "the model returns its features" for k in _makers(label, trace) if k[0] not in assignment.logits})
    return refused


def _makers(label: Tensor, trace: FeatureTrace) -> list[Key]:
    """Return the weights that make features of the same sets as these."""
    present = shrunk(label).unique()
    sets = trace.classes.find(present[present > 0]).unique()
    return [k for k in made_by_weight(trace) if bool(torch.isin(trace.classes.find(trace.nodes[k]), sets).any())]


def weights_inside(module: str, why: str, trace: FeatureTrace) -> dict[Key, str]:
    """Return the sharded weights of a module whose code raised on a rank; if there are none, of the module around it."""
    while True:
        used = {u.name for u in trace.uses if not module or enclosing(u.module, {module})}
        name = starred(module) or "the model"
        inside = {k: f"`{name}` does not run on local shards ({why})" for k in made_by_weight(trace) if k[0] in used}
        if inside:
            return inside
        if not module:
            return {k: f"the model does not run on local shards ({why})" for k in trace.nodes}
        module = module.rpartition(".")[0]


def owners(trace: FeatureTrace, tp: int) -> Tensor:
    """Return the rank of each feature: the sets of features of each kind are dealt out evenly, in order."""
    rank_of = torch.full((trace.classes.parent.numel(),), -1)  # of sets
    signatures = _signatures(trace)
    for key in trace.nodes:
        for size, sets in _kinds_of_sets(trace, key, signatures, tp):
            new = sets[rank_of[sets] < 0]
            n = new.numel()
            if size == 1:  # as torch.chunk cuts
                counts = [len(even_shard(n, r, tp)) for r in range(tp)]
            else:
                counts = [(r + 1) * n // tp - r * n // tp for r in range(tp)]
            rank_of[new] = torch.repeat_interleave(torch.arange(tp), torch.tensor(counts))
    owner = rank_of[trace.classes.find(torch.arange(rank_of.numel()))]
    owner[0] = -1
    return owner


def _kinds_of_sets(trace: FeatureTrace, key: Key, signatures: Tensor, tp: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (features that a weight has in each, sets) of those that are dealt out by themselves.

    Sets of one size that are not of the same weights (heads of two branches in one fused weight) are of two kinds, if there are enough of
    each.
    """
    pieces: list[Tensor | None] = [*trace.pieces.get(key, ())] or [None]
    for size, sets in [kind for piece in pieces for kind in _sets_by_size(trace, key, piece)]:
        signature = signatures[sets]
        branches = [sets[signature == s] for s in dict.fromkeys(signature.tolist())]
        yield from ((size, branch) for branch in (branches if all(b.numel() >= tp for b in branches) else [sets]))


def _signatures(trace: FeatureTrace) -> Tensor:
    """Return for each set a number that tells how many features of which weights are in it: equal where these are."""
    signatures = torch.zeros(trace.classes.parent.numel(), dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    for nodes in trace.nodes.values():
        sets = trace.classes.find(nodes)
        factor = torch.randint(2**62, (), generator=generator)
        signatures.scatter_add_(0, sets, factor.expand(sets.shape))  # it may wrap around
    return signatures


def logits_of(run: TracedRun) -> dict[str, int]:
    """Return the weights whose features reach the output or the loss one by one, and how many these are."""
    trace, outs = run.trace, made_by_weight(run.trace)
    reached = [shrunk(label).unique() for label in [*run.outputs, *trace.logits]]
    seen = torch.cat(reached).unique() if reached else torch.zeros(0, dtype=torch.int64)
    return {
        name: nodes.numel()
        for (name, dim), nodes in trace.nodes.items()
        if name not in trace.convolved  # pictures: their channels lie along dim 1, not along the last dim
        and (name, dim) in outs
        and bool(torch.isin(nodes[:1], seen))
        and bool(torch.isin(nodes, seen).all())
    }


def styled_layers(model: nn.Module, trace: FeatureTrace, parameters: Parameters) -> dict[str, str]:
    """Return the linear layers that run the forward of their own class, and are the only ones to use their weight."""
    users: dict[str, set[str]] = defaultdict(set)
    for use in trace.uses:
        users[use.name].add(use.module)
    layers = {}
    for name, modules in users.items():
        where = next(iter(modules))
        module = model.get_submodule(where)
        if len(modules) != 1 or getattr(module, "weight", None) is not parameters[name]:
            continue
        if (isinstance(module, nn.Linear) and runs_torchs_code(module)) or is_conv1d(module):
            layers[name] = where
    return layers
