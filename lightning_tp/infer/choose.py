"""Which plan a model gets that was given none: what it declares, if that is right and good, else what is inferred."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import nn

from lightning_tp.core.modules.snapshot import MetaWeights, has_more_than, preserve_buffers_and_rng, preserve_modules
from lightning_tp.errors import TPError
from lightning_tp.infer import infer_by_call
from lightning_tp.infer.dry_run import dry_run
from lightning_tp.infer.repeats import alike_blocks
from lightning_tp.infer.search import MOST_REAL
from lightning_tp.plan.check import INFERRED
from lightning_tp.plan.declared import declared_plan
from lightning_tp.plan.plan import Plan

AS_GOOD = 1.01  # of what a rank holds by the inferred plan: up to this, what the model's authors have declared is taken


def default_plan(model: nn.Module, call: Callable[[nn.Module, Any], Any], inputs: Any, tp: int) -> Plan:
    """The plan of a model that runs by `call(model, inputs)`.

    What it declares is checked against its modules and tried on a rank's shards, and compared with what can be inferred: a declaration
    often splits the embedding only, or gathers queries and keys so that every rank computes all heads. The one by which a rank holds less
    is taken, weights first, then activations, and says so as its `source`.

    Raises:
        TPError: if there is neither; with the reason why nothing could be inferred.
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
        why = f"a rank holds {by_inferred / total:.0%} of the weights; as {declared.source}, {by_declared / total:.0%}"
    elif inferred.sequence_parallel and not declared.sequence_parallel:
        why = f"as {declared.source}, and with sequence parallelism"
    else:
        return declared
    return Plan(inferred.rules, f"{INFERRED}: {why}")


def _usable(model: nn.Module, call: Callable[[nn.Module, Any], Any], inputs: Any, tp: int) -> Plan | None:
    """What the model declares, checked, if it fits and runs."""
    try:
        declared = declared_plan(model, tp)
        if declared is None:
            return None
        declared.check(model, tp)
    except TPError:
        return None  # not believed
    large = has_more_than(model, MOST_REAL)
    with preserve_buffers_and_rng(model):
        with MetaWeights(model) if large else nullcontext(), preserve_modules(model):
            alike = alike_blocks(model, call, inputs)
        return declared if dry_run(model, call, inputs, declared, tp, alike) is None else None
