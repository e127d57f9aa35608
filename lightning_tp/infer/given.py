"""Follow the first batch for a plan that somebody wrote, as for one that is searched for: does it split what has to stay together?

Three things are looked at: whether the code runs on a rank's shards at all, whether sets of features that belong together (a query head with its
key, a gate with its value) lie on one rank, and whether code sees sizes of shards where it needs those of full tensors. What is found is a doubt:
code that can't be followed gives false ones, so the caller compares the numbers of the first batch before it refuses the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_tp.core.comm.state import WIDTH
from lightning_tp.core.modules.snapshot import MetaWeights, has_more_than
from lightning_tp.core.ops.random_calls import comparable_runs
from lightning_tp.infer.assign import Assignment, logits_of, made_by_weight, styled_layers, why_joined
from lightning_tp.infer.blocks.identical import Caller
from lightning_tp.infer.blocks.workload import TracedRun, Workload
from lightning_tp.infer.dry_run import dry_run
from lightning_tp.infer.follow.features import shrunk
from lightning_tp.infer.record import record_calls
from lightning_tp.infer.search import MOST_REAL
from lightning_tp.plan.checked import CheckedPlan
from lightning_tp.plan.plan import Plan
from lightning_tp.styles import Colwise, FusedColwise, RewrittenCalls, Rowwise, ShardParameter, Split


class Doubt(NamedTuple):
    """What speaks against a plan."""

    module: str  # where; "" if that is not known
    why: str
    remedy: str
    raises: bool = False  # its code raised on a rank's shards

    def __str__(self) -> str:
        return f"{f'`{self.module}`: ' if self.module else ''}{self.why}. {self.remedy}"


def doubt_about(model: nn.Module, call: Caller, inputs: Any, plan: Plan, tp: int) -> Doubt | None:
    """Follow one run of a model for a given plan, which fits its modules, and say what speaks against it first; None if nothing does.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> call, inputs = (lambda model, x: model(x)), torch.ones(2, 3, 8)
        >>> doubt_about(model, call, inputs, Plan({"0": "colwise", "2": "rowwise"}), 2) is None
        True
        >>> print(doubt_about(model, call, inputs, Plan({"0": "colwise", "2": "replicate"}), 2))
        `2`: it does not run on shards (RuntimeError: mat1 and mat2 shapes cannot be multiplied (6x16 and 32x8)). Is the layer before it ...
    """
    with comparable_runs(model):
        workload = Workload(model, call, inputs, tp).with_identical_blocks()
        failure = dry_run(workload, plan)
        if failure is not None:
            return Doubt(failure.module, f"it does not run on shards ({failure.why})", _REMEDY_OF_SHAPES, raises=True)
        large = has_more_than(model, MOST_REAL)
        with MetaWeights(model) if large else nullcontext():
            return _follow(Workload(model, call, inputs, tp), plan.check(model, tp))


_REMEDY_OF_SHAPES = (
    "Is the layer before it `colwise` and this one not `rowwise`? Is the order of the two swapped? Does code have the number of heads, or a width, "
    "in it, which is smaller on a rank? Write `-1` there, keep the layers `replicate`, or leave `plan` out: then such code is adapted"
)


def _follow(workload: Workload, plan: CheckedPlan) -> Doubt | None:
    parameters = dict(workload.model.named_parameters())
    followed = {(name, split.dim): split for name, split in _followed(plan).items() if name in parameters}
    whole = frozenset((n, d) for n, p in parameters.items() for d in range(p.ndim) if (n, d) not in followed)
    run = workload.trace(set(whole), {})
    trace, entry_of = run.trace, {name: entry for entry in plan.entries for name in entry.splits}
    outs = made_by_weight(trace)
    owner = torch.full((trace.classes.parent.numel(),), -1)
    for key in (*outs, *trace.nodes):
        if key not in followed:
            continue
        sets = trace.classes.find(trace.nodes[key])
        ranks = _rank_of_each(followed[key], sets.numel(), workload.tp)
        before = owner[sets]
        owner[sets] = torch.where(before < 0, ranks, before)
        if bool(((owner[sets] != ranks) & (sets > 0)).any()):
            where = entry_of[key[0]].where
            return Doubt(
                where,
                f"by the plan, features that are needed together lie on several ranks ({why_joined(trace, key)})",
                _remedy(entry_of[key[0]].style),
            )
    for name, dim in followed:
        style, where = entry_of[name].style, entry_of[name].where
        used = {u.name for u in trace.uses} | set(trace.local_uses) | set(trace.whole_uses)
        if isinstance(style, Rowwise) and name.endswith("weight") and name in used and (name, dim) not in trace.nodes:
            return Doubt(where, "it is `rowwise`, but every rank has all of its input", _SWAPPED)
    owner = owner[trace.classes.find(torch.arange(owner.numel()))]
    owner[0] = -1
    if any(split.sum_over(plan.tp) > 1 and split.dim is not None for split in plan.splits.values()):
        return None  # ranks share heads, which are not followed above: calls would seem to meet all of them
    assignment = Assignment(trace, whole, {}, owner, logits_of(run), styled_layers(workload.model, trace, parameters))
    return _doubt_of_calls(workload, plan, assignment, run, entry_of)


def _doubt_of_calls(
    workload: Workload, plan: CheckedPlan, assignment: Assignment, run: TracedRun, entry_of: Mapping[str, Any]
) -> Doubt | None:
    """Calls that would need other sizes, and features that leave the model."""
    trace, outs = assignment.trace, made_by_weight(assignment.trace)
    recording = record_calls(workload, assignment)
    adapted = {e.where for e in plan.entries if isinstance(e.style, RewrittenCalls)}
    for module, calls in recording.changes.calls.items():
        if module not in adapted and any(c.changes for c in calls):
            name = next(c.name for c in calls if c.changes)
            return Doubt(
                module, f"its code calls `{name}` with sizes of full tensors, and a rank has a shard of them", _REMEDY_OF_SHAPES
            )
    bad = [(label, str(why)) for label, why in recording.changes.broken]
    bad += [(label, "the model returns its output, of which each rank has a shard") for label in run.outputs]
    for label, why in bad:
        present = shrunk(label).unique()
        sets = trace.classes.find(present[present > 0]).unique()
        for key in outs:
            if key[0] not in assignment.logits and bool(torch.isin(trace.classes.find(trace.nodes[key]), sets).any()):
                return Doubt(
                    entry_of[key[0]].where,
                    why,
                    "Make the layer that reads it `rowwise`, give this one `output=I` (all-gathered), or `replicate`",
                )
    return None


_READ_IN_FULL = "Make the layer that reads it `rowwise`, give this one `output='I'` (all-gathered), or keep it `replicate`"
_SWAPPED = "Make it `colwise`, and `rowwise` the layer that reads its output; or, if it has to stay `rowwise`, give it `input='I'`"


def _remedy(style: Any) -> str:
    if isinstance(style, Colwise):
        return (
            "If this layer computes several things at once (q, k and v; gate and up), its style is `fused_colwise` with their `parts`; else keep it "
            "`replicate`, or give it `output='I'` (all-gathered)"
        )
    if isinstance(style, FusedColwise):
        return "Are `parts` and `heads` those of the code that takes its output apart? Else keep it `replicate`"
    return "The layer before it cuts its output in another way: compare `parts`, `heads` and `ranges` of both, or leave `plan` out"


def _followed(plan: CheckedPlan) -> dict[str, Split]:
    """Weights that make or read sharded features, by the plan; not those whose output is gathered, nor those that ranks share parts of."""
    found = {}
    for entry in plan.entries:
        style = entry.style
        makes = isinstance(style, (FusedColwise, ShardParameter)) or (isinstance(style, Colwise) and style.output == WIDTH)
        if makes or (isinstance(style, Rowwise) and style.input == WIDTH):
            for name, split in entry.splits.items():
                if split.dim is not None and split.sum_over(plan.tp) == 1 and len(entry.shapes[name]) > 1:
                    found[name] = split
    return found


def _rank_of_each(split: Split, length: int, tp: int) -> Tensor:
    """(length,) the rank that holds each index."""
    ranks = torch.full((length,), -1)
    for rank in range(tp):
        for start, stop in split.ranges[rank]:
            ranks[start:stop] = rank
    return ranks
