"""Keep the plans and traces of a model, so that each distinct step is traced once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lightning_tp.apply.parallelize import PlanLike, resolve_plan
from lightning_tp.errors import TPError
from lightning_tp.estimate.rank.inputs import LossOf
from lightning_tp.estimate.rank.optimizer import StepCosts
from lightning_tp.estimate.rank.rank_model import RankModel
from lightning_tp.estimate.rank.settings import Settings
from lightning_tp.estimate.rank.trace_step import trace_step
from lightning_tp.infer.choose import default_plan
from lightning_tp.infer.search import call_with
from lightning_tp.plan.checked import CheckedPlan
from lightning_tp.plan.plan import Plan

SUGGESTED = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)  # sizes of the axis that an error may suggest


@dataclass
class TraceCache:
    """A model with all that was found about it."""

    model: nn.Module  # on any device
    inputs: Any  # of one rank's forward
    loss_of: LossOf  # (model, inputs) -> loss
    plan: PlanLike | None = None  # as for `parallelize`; None: the default plan
    step_costs: StepCosts = field(default_factory=dict)  # of the optimizer's steps; see `rank.optimizer`
    _plans: dict[tuple[int, bool], CheckedPlan] = field(default_factory=dict)
    _traced: dict[Any, RankModel] = field(default_factory=dict)
    _unsharded: dict[Any, RankModel] = field(default_factory=dict)

    def plan_of(self, tp: int, sequence_parallel: bool) -> CheckedPlan:
        """Return the checked plan; if none fits this size, a `TPError` names sizes that fit."""
        key = (tp, sequence_parallel)
        if key not in self._plans:
            try:
                self._plans[key] = self._checked_plan(tp, sequence_parallel)
            except TPError as error:
                fit = [n for n in SUGGESTED if n != tp and self._fits(n, sequence_parallel)]
                if fit == [1]:  # it has nothing to do with the size
                    raise
                raise TPError(
                    f"tp={tp} does not fit {type(self.model).__name__}: {error} These fit: tp={', '.join(map(str, fit))}."
                ) from error
        return self._plans[key]

    def _checked_plan(self, tp: int, sequence_parallel: bool) -> CheckedPlan:
        if tp == 1:
            return Plan({"**": "replicate"}, source="nothing to split over tp=1").check(self.model, 1)
        plan = self.plan if self.plan is not None else default_plan(self.model, call_with, self.inputs, tp)
        found = resolve_plan(self.model, plan, tp, sequence_parallel=sequence_parallel)
        if not found.shards_anything:
            raise TPError(found.why_nothing_is_sharded(self.model))
        return found

    def _fits(self, tp: int, sequence_parallel: bool) -> bool:
        try:
            self._checked_plan(tp, sequence_parallel)
        except TPError:
            return False
        return True

    def largest_rank(self, tp: int, sequence_parallel: bool) -> int:
        """Return the rank of the tensor-parallel axis that holds most parameters; the first one if all hold as many."""
        plan = self.plan_of(tp, sequence_parallel)
        return max(range(tp), key=plan.local_numel)

    def rank_model(self, inputs: Any, settings: Settings) -> RankModel:
        """Return the model on a rank, traced with these inputs."""
        # more data-parallel ranks change how parameters are sharded, not what runs; that there are any may change their dtype
        of_two = replace(settings, dp=min(settings.dp, 2))
        key = (settings_key(of_two), _shapes(inputs))
        plan = self.plan_of(settings.tp, settings.sequence_parallel)
        if key not in self._traced:
            self._traced[key] = self._trace(inputs, plan, of_two)
        found = self._traced[key]
        return found if settings.dp == of_two.dp else found.with_data_parallel(settings.dp)

    def unsharded(self, inputs: Any, settings: Settings) -> RankModel:
        """Return the model in one process: for its FLOPs, which depend on shapes only."""
        key = _shapes(inputs)
        if key not in self._unsharded:
            self._unsharded[key] = self.rank_model(inputs, replace(settings, tp=1, rank=0, activation_checkpointing=None))
        return self._unsharded[key]

    def _trace(self, inputs: Any, plan: CheckedPlan, settings: Settings) -> RankModel:
        return trace_step(self.model, self.loss_of, inputs, plan, settings)


def settings_key(settings: Settings) -> Any:
    """Return what traces depend on beside the inputs, to compare; a predicate for activation checkpointing equals itself only."""
    how = settings.activation_checkpointing
    return replace(settings, activation_checkpointing=None), how if isinstance(how, str) else id(how)


def _shapes(inputs: Any) -> Any:
    return tuple((tuple(t.shape), t.dtype) for t in tree_flatten(inputs)[0] if isinstance(t, Tensor))
