"""Find the plan of a LightningModule that was given none, and look at one that was applied.

A plan is inferred on the first rank, from its step on the first batch. The others receive it.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from lightning_tp._compat import loaders_to_run
from lightning_tp.core.comm.agree import Peers
from lightning_tp.core.forked import NoChild, in_child
from lightning_tp.core.modules.call_site import raised_at
from lightning_tp.core.modules.outer_calls import remember_called
from lightning_tp.core.ops.rng import local_state_restored
from lightning_tp.data.sample_batch import first_of
from lightning_tp.errors import TPError
from lightning_tp.infer.choose import default_plan
from lightning_tp.infer.given import Doubt, doubt_about
from lightning_tp.infer.search import call_with
from lightning_tp.plan.checked import CheckedPlan
from lightning_tp.plan.plan import Plan
from lightning_tp.trainer.rehearsal import Rehearsal

T = TypeVar("T")


def plan_of_module(module: pl.LightningModule, trainer: pl.Trainer, tp: int) -> Plan:
    """Infer the plan of a LightningModule on the first rank, or take the one that the model inside declares; else `TPError`. A collective.

    Its step on the first batch says how its weights are used. Only if that can't be run, `forward` on `example_input_array` does.
    """
    rehearsal, example = Rehearsal(module, trainer), module.example_input_array
    remedy = "Pass `TPStrategy(plan=..)`" if example is not None else "Set `example_input_array`, or pass `TPStrategy(plan=..)`"

    def find() -> Plan:
        with rehearsal.stage():
            try:
                return _plan_of_step(rehearsal, tp)
            except Exception as error:
                if example is None:
                    raise
                cause = error.__cause__ or error
                why = f"`{rehearsal.name}` raised {type(cause).__name__}: {cause}"
            inputs = example if isinstance(example, (dict, tuple)) else (example,)
            plan = default_plan(module, call_with, inputs, tp)
            return Plan(plan.rules, f"{plan.source}; of `forward` on `example_input_array`, since {why}")

    traced = f"{type(module).__name__}.{rehearsal.name if example is None else 'forward'}"
    return plan_of_first_rank(find, module, tp, traced=traced, remedy=remedy, called=rehearsal.called)


def _plan_of_step(rehearsal: Rehearsal, tp: int) -> Plan:
    batch = rehearsal.prepared(first_batch(rehearsal.trainer, whole=True))
    try:
        return default_plan(rehearsal.module, rehearsal.call, batch, tp)
    except Exception:
        with suppress(Exception):
            return default_plan(rehearsal.module, rehearsal.call_after_hooks, batch, tp)
        raise


def plan_of_first_rank(
    find: Callable[[], Plan], module: nn.Module, tp: int, *, traced: str, remedy: str, called: Set[str] | None = None
) -> Plan:
    """Let the first rank find the plan of a module, in a child of its process, and hand it to all. A collective.

    Which modules a step has `called` by themselves while it was found is remembered; None: no step was followed.

    `TPError` on all ranks, if it can't be found, which says what `find` has traced and what to do, or if it splits nothing.
    """

    def find_and_check() -> tuple[Plan, frozenset[str] | None]:
        try:
            found = find()
        except Exception as error:
            cause = error.__cause__ if isinstance(error, TPError) else error  # `infer` says so without the name of the step
            if cause is None:
                raise
            message = f"Could not infer a plan: tracing `{traced}` raised {type(cause).__name__}: {cause}{raised_at(cause.__traceback__)}."
            raise TPError(f"{message} {remedy}.") from cause
        checked = found.check(module, tp)
        if not checked.shards_anything:
            raise TPError(checked.why_nothing_is_sharded(module))
        return found, None if called is None else frozenset(called)

    plan, names = Peers().from_first(partial(_in_child_if_possible, find_and_check))
    if names is not None:
        remember_called(module, names)
    return plan


def _in_child_if_possible(run: Callable[[], T]) -> T:
    """Run a function in a child of this process, or here, where no child can be."""
    try:
        return in_child(run)
    except NoChild:
        return run()


def doubt_about_plan(module: pl.LightningModule, trainer: pl.Trainer, plan: Plan, tp: int) -> Doubt | None:
    """Follow the step on the first batch for a plan that somebody wrote, on the first rank, and say what speaks against it. A collective.

    None as well where the step can't be followed.
    """
    rehearsal = Rehearsal(module, trainer)

    def look() -> tuple[Doubt | None, frozenset[str]]:
        doubt = None
        with suppress(Exception), rehearsal.stage():
            batch = rehearsal.prepared(first_batch(rehearsal.trainer, whole=True))
            doubt = doubt_about(module, rehearsal.call, batch, plan, tp)
        return doubt, frozenset(rehearsal.called)

    doubt, names = Peers().from_first(partial(_in_child_if_possible, look))
    remember_called(module, names)
    return doubt


def first_batch(trainer: pl.Trainer, *, whole: bool = False) -> Any:
    """Take a small first batch, on the CPU, of the data that a Trainer is about to use; no data is consumed, and no random number drawn.

    Args:
        trainer: at the beginning of a run.
        whole: with all its samples.
    """
    with local_state_restored():
        return tree_map_only(Tensor, lambda t: t.detach().cpu(), first_of(loaders_to_run(trainer), whole=whole))


def applied_plan(module: nn.Module | None) -> CheckedPlan | None:
    """The plan that was applied to a module, or to one inside it; None if it is not split."""
    modules = module.modules() if module is not None else ()
    return next((m._tp_applied_plan for m in modules if hasattr(m, "_tp_applied_plan")), None)  # type: ignore[return-value]


def is_split(module: nn.Module, tp: int) -> bool:
    """Whether a module is split already; `TPError` if it is for another size."""
    applied = applied_plan(module)
    if applied is not None and applied.tp != tp:
        raise TPError(f"This module is split for tp={applied.tp} already, and the strategy has tp={tp}. Create a new module.")
    by_hand = next((name for name, p in module.named_parameters() if isinstance(p, DTensor)), None) if applied is None else None
    if by_hand is not None:
        raise TPError(
            f"`{by_hand}` is a DTensor already: the module was split by hand, by torch's `parallelize_module` or `fully_shard`. Leave that out, "
            "since the strategy splits the module itself; pass how as `TPStrategy(plan=..)`."
        )
    return applied is not None


def fsdp_root(module: pl.LightningModule) -> nn.Module:
    """The module that a step calls, for FSDP2: the one child that has all the parameters, else the LightningModule itself."""
    if next(module.parameters(recurse=False), None) is not None:
        return module
    children = [child for child in module.children() if next(child.parameters(), None) is not None]
    return children[0] if len(children) == 1 else module


def call_before_split(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Call `before_split(trainer, pl_module)` of the callbacks that have it: the last moment at which rank 0 has the full module."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "before_split"):
            callback.before_split(trainer, module)
