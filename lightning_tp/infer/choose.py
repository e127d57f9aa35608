"""Choose the plan of a model that was given none: what it declares, if that is right and good, else what is inferred."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import nn

from lightning_tp.core.modules.snapshot import MetaWeights, has_more_than
from lightning_tp.core.ops.random_calls import comparable_runs
from lightning_tp.errors import TPError
from lightning_tp.infer import infer_by_call
from lightning_tp.infer.blocks.workload import Workload
from lightning_tp.infer.dry_run import dry_run
from lightning_tp.infer.search import MOST_REAL
from lightning_tp.plan.declared import declared_plan
from lightning_tp.plan.plan import Plan
from lightning_tp.plan.rule import INFERRED

AS_GOOD = 1.01  # of what a rank holds by the inferred plan: up to this, the declared plan is taken


def default_plan(model: nn.Module, call: Callable[[nn.Module, Any], Any], inputs: Any, tp: int) -> Plan:
    """Return the plan of a model that runs by `call(model, inputs)`: the declared or the inferred one.

    The declared plan is checked against the model's modules, tried on a rank's shards, and compared with the inferred one: a declaration
    often shards the embedding only, or all-gathers queries and keys so that every rank computes all heads. The plan by which a rank holds
    less is taken, parameters first, then activations, and its `source` says so.

    Raises:
        TPError: if there is neither; with the reason why no plan could be inferred.
    """
    declared = _usable(model, call, inputs, tp)
    try:
        inferred = infer_by_call(model, call, inputs, tp)
    except TPError:
        if declared is None:
            raise
        return declared
    if declared is None:
        return inferred
    checked = declared.check(model, tp)
    total, by_declared = checked.numel, checked.local_numel(0)
    by_inferred = inferred.check(model, tp).local_numel(0)
    if by_declared > AS_GOOD * by_inferred:
        why = f"a rank holds {by_inferred / total:.0%} of the parameters; as {declared.source}, {by_declared / total:.0%}"
    elif inferred.sequence_parallel and not declared.sequence_parallel:
        why = f"as {declared.source}, and with sequence parallelism"
    else:
        return declared
    return Plan(inferred.rules, f"{INFERRED}: {why}")


def _usable(model: nn.Module, call: Callable[[nn.Module, Any], Any], inputs: Any, tp: int) -> Plan | None:
    """Return the plan that the model declares, checked; None if there is none, or it does not fit or run."""
    try:
        declared = declared_plan(model, tp)
        if declared is None:
            return None
        declared.check(model, tp)
    except TPError:
        return None
    large = has_more_than(model, MOST_REAL)
    with comparable_runs(model):
        with MetaWeights(model) if large else nullcontext():
            workload = Workload(model, call, inputs, tp).with_identical_blocks()
        return declared if dry_run(workload, declared) is None else None
