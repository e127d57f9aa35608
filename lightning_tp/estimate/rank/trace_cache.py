"""Keep the traces of a model, so that each distinct step is traced once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lightning_tp.apply.parallelize import PlanLike, resolve_plan
from lightning_tp.errors import TPError
from lightning_tp.estimate.rank.inputs import LossOf, _shapes
from lightning_tp.estimate.rank.optimizer import Steps
from lightning_tp.estimate.rank.rank_model import RankModel
from lightning_tp.estimate.rank.settings import Settings
from lightning_tp.estimate.rank.trace_step import trace_step
from lightning_tp.infer.choose import default_plan
from lightning_tp.infer.search import call_with
from lightning_tp.plan.check import any_split, splits_nothing
from lightning_tp.plan.plan import Plan

TRIED = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)  # sizes of the axis that are looked at for one that fits


@dataclass
class TraceCache:
    """Traces a model as often as its shapes ask for it, and remembers.

    Args:
        model: on any device.
        inputs: of one rank's forward.
        loss_fn: as for `verify`.
        plan: given, or None.
    """

    model: nn.Module
    inputs: Any
    loss_of: LossOf
    plan: PlanLike | None = None
    _plans: dict[tuple[int, bool], Plan] = field(default_factory=dict)
    _worlds: dict[Any, RankModel] = field(default_factory=dict)
    _wholes: dict[Any, RankModel] = field(default_factory=dict)
    steps: Steps = field(default_factory=dict)  # of the optimizer, that have been looked at

    def plan_of(self, tp: int, sequence_parallel: bool) -> Plan:
        """The checked plan.

        Raises:
            TPError: if none fits; it says which tp do.
        """
        key = (tp, sequence_parallel)
        if key not in self._plans:
            try:
                self._plans[key] = self._plan(tp, sequence_parallel)
            except TPError as error:
                fit = [n for n in TRIED if n != tp and self._fits(n, sequence_parallel)]
                if fit == [1]:  # it has nothing to do with the number
                    raise
                raise TPError(
                    f"tp={tp} does not fit {type(self.model).__name__}: {error} These fit: tp={', '.join(map(str, fit))}."
                ) from error
        return self._plans[key]

    def largest_rank(self, tp: int, sequence_parallel: bool) -> int:
        """The rank of the tensor-parallel axis that holds most; the first one where all hold as much."""
        plan = self.plan_of(tp, sequence_parallel)
        held = [0] * tp
        for name, split in plan.splits.items():
            shape = plan.shapes[name]
            if split.dim is not None:
                for rank in range(tp):
                    held[rank] += math.prod(split.local_shape(shape, rank))
        return held.index(max(held))

    def _plan(self, tp: int, sequence_parallel: bool) -> Plan:
        if tp == 1:
            return Plan({"**": "replicate"}, source="nothing to split over tp=1").check(self.model, 1)
        plan = self.plan if self.plan is not None else default_plan(self.model, call_with, self.inputs, tp)
        found = resolve_plan(self.model, plan, tp, sequence_parallel=sequence_parallel)
        if not any_split(found.entries):
            raise TPError(splits_nothing(found, self.model, tp))
        return found

    def _fits(self, tp: int, sequence_parallel: bool) -> bool:
        try:
            self._plan(tp, sequence_parallel)
        except TPError:
            return False
        return True

    def world(self, inputs: Any, settings: Settings, sequence_parallel: bool) -> RankModel:
        """The model on a rank, traced."""
        # more data-parallel ranks change how parameters are cut, not what is traced; that there are any may change their dtype
        same = replace(settings, dp=min(settings.dp, 2))
        key = (self.kind(same, sequence_parallel), _shapes(inputs))
        plan = self.plan_of(settings.tp, sequence_parallel)
        if key not in self._worlds:
            self._worlds[key] = self.trace(inputs, plan, same, sequence_parallel)
        found = self._worlds[key]
        return found if settings.dp == same.dp else found.over(settings.dp)

    def trace(self, inputs: Any, plan: Plan, settings: Settings, sequence_parallel: bool) -> RankModel:
        """The step with these inputs."""
        return trace_step(self.model, self.loss_of, inputs, plan, settings)

    @staticmethod
    def kind(settings: Settings, sequence_parallel: bool) -> Any:
        """What traces depend on beside the inputs, to compare."""
        how = settings.activation_checkpointing
        return replace(settings, activation_checkpointing=None), how if isinstance(how, str) else id(how), sequence_parallel

    def whole(self, inputs: Any, settings: Settings, sequence_parallel: bool) -> RankModel:
        """The model in one process: for its FLOPs, which depend on shapes only."""
        key = _shapes(inputs)
        if key not in self._wholes:
            self._wholes[key] = self.world(
                inputs, replace(settings, tp=1, rank=0, activation_checkpointing=None), sequence_parallel
            )
        return self._wholes[key]
