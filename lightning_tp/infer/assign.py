"""Assign features to ranks: which sets of features are split, which stay whole, and why."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tp.core.comm.axis import even_shard
from lightning_tp.core.modules.blocks import starred
from lightning_tp.infer.calls.recorder import CallChanges
from lightning_tp.infer.follow.features import shrunk
from lightning_tp.infer.follow.run import leaves
from lightning_tp.infer.follow.trace import FeatureTrace
from lightning_tp.styles.base import is_conv1d
from lightning_tp.styles.linear import _runs_torchs_code

TABLE = "a table is split by its rows"


MOST_SHARES = 2  # times that a further part of one fused weight is given to every rank


SMALL_VOCAB = 64  # rows a rank, below which an embedding or a head is kept whole


Key = tuple[str, int]


def _inside(where: str, why: str, trace: FeatureTrace) -> dict[Key, str]:
    """The weights that are split for a module whose code raised on a rank, or, if there are none, around it."""
    while True:
        used = {u.name for u in trace.uses if not where or u.module == where or u.module.startswith(f"{where}.")}
        bad = {k: f"`{starred(where) or 'the model'}` does not run on shards ({why})" for k in _out_keys(trace) if k[0] in used}
        if bad or not where:
            return bad or {k: f"the model does not run on shards ({why})" for k in trace.nodes}
        where = where.rpartition(".")[0]


def _out_keys(trace: FeatureTrace) -> dict[Key, None]:
    return {(u.name, u.dim): None for u in trace.uses if u.kind in ("out", "along")}


def _kinds(trace: FeatureTrace, key: Key, piece: Tensor | None = None) -> list[tuple[int, Tensor]]:
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


def _too_few(trace: FeatureTrace, tp: int, names: dict[str, Any]) -> dict[Key, str]:
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


def _why_together(trace: FeatureTrace, key: Key, tp: int) -> str:
    """Which operation joined the features of a weight for the last time."""
    find = trace.classes.find
    mine = set(find(trace.nodes[key]).tolist())
    joins = trace.classes.joins
    roots = find(torch.tensor([feature for feature, _ in joins], dtype=torch.int64)).tolist()
    by = next((why for root, (_, why) in zip(reversed(roots), reversed(joins), strict=True) if root in mine), "its use")
    return f"{starred(by)} needs its features together, in fewer than tp={tp} parts"


def _share(
    bad: dict[Key, str], trace: FeatureTrace, shared: dict[Key, Tensor], names: dict[str, Any], tries: dict[str, int]
) -> bool:
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


def _escaped(trace: FeatureTrace, out: Any, tracer: Any) -> bool:
    """Whether something that every rank has beside its shards, each with its share of the gradient, is used as a whole elsewhere."""
    labels = [tracer.shadow(t).label for t in leaves(out)]
    return bool(trace.leaked_partial) or any(x is not None and not bool(shrunk(x).any()) for x in labels)


def _demote(bad: dict[Key, str], whole: dict[Key, str], names: dict[str, Any], trace: FeatureTrace) -> None:
    """Keep these weights whole, and those of the blocks alike: not those of other widths, as the stages of a pyramid have."""
    if all(key in whole for key in bad):  # no step ahead: give up all
        bad = {k: "how its features are used could not be told" for k in trace.nodes}
    stars = {(starred(n), names[n].shape, d): why for (n, d), why in bad.items()}
    for n in names:
        for d in range(names[n].ndim):
            if (starred(n), names[n].shape, d) in stars:
                whole[n, d] = stars[starred(n), names[n].shape, d]


def _members(trace: FeatureTrace) -> Tensor:
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


def _owners(trace: FeatureTrace, tp: int) -> Tensor:
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


def _heads(model: nn.Module, trace: FeatureTrace, owner: Tensor, out: Any, tracer: Any, tp: int) -> dict[str, int]:
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


def _standard(model: nn.Module, trace: FeatureTrace, names: dict[str, Any]) -> dict[str, str]:
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


def _broken(
    found: CallChanges, trace: FeatureTrace, owner: Tensor, sinks: list[Tensor], heads: dict[str, int], tp: int
) -> dict[Key, str]:
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


def _made_by(label: Tensor, trace: FeatureTrace) -> list[Key]:
    present = shrunk(label).unique()
    classes = trace.classes.find(present[present > 0]).unique()
    return [k for k in _out_keys(trace) if bool(torch.isin(trace.classes.find(trace.nodes[k]), classes).any())]
