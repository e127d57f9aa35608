"""Keep the traces of a model, so that each distinct step is traced once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lightning_tp.apply.parallelize import PlanLike, resolve_plan
from lightning_tp.errors import TPError
from lightning_tp.estimate.trace.optimizer import Steps
from lightning_tp.estimate.trace.rank import LossOf, RankModel, Settings, default_loss, trace_step
from lightning_tp.infer.choose import default_plan
from lightning_tp.infer.search import call_with
from lightning_tp.plan.checked import CheckedPlan
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
    _plans: dict[tuple[int, bool], CheckedPlan] = field(default_factory=dict)
    _worlds: dict[Any, RankModel] = field(default_factory=dict)
    _wholes: dict[Any, RankModel] = field(default_factory=dict)
    steps: Steps = field(default_factory=dict)  # of the optimizer, that have been looked at

    def plan_of(self, tp: int, sequence_parallel: bool) -> CheckedPlan:
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

    def _plan(self, tp: int, sequence_parallel: bool) -> CheckedPlan:
        if tp == 1:
            return Plan({"**": "replicate"}, source="nothing to split over tp=1").check(self.model, 1)
        plan = self.plan if self.plan is not None else default_plan(self.model, call_with, self.inputs, tp)
        found = resolve_plan(self.model, plan, tp, sequence_parallel=sequence_parallel)
        if not found.shards_anything:
            raise TPError(found.why_nothing_is_sharded(self.model))
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

    def trace(self, inputs: Any, plan: CheckedPlan, settings: Settings, sequence_parallel: bool) -> RankModel:
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


def check_size(name: str, value: Any) -> None:
    """Refuse what is no number of something.

    Raises:
        TPError: with the value.
    """
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise TPError(f"`{name}={value!r}`: give a whole number, 1 or more.")


def loss_of(loss_fn: Callable[..., Tensor] | None) -> LossOf:
    """(model, inputs) -> the loss."""
    import inspect

    fn: Callable[..., Tensor] = loss_fn or default_loss
    try:
        wants = [p for p in inspect.signature(fn).parameters.values() if p.default is p.empty and p.kind in (0, 1)]
        two = len(wants) > 1
    except (TypeError, ValueError):
        two = False

    def loss(model: nn.Module, inputs: Any) -> Tensor:
        output = call_with(model, inputs)
        try:
            found = fn(output, inputs) if two else fn(output)
        except TPError:
            raise
        except Exception as error:
            raise TPError(
                f"`loss_fn` ended with {type(error).__name__}: {' '.join(str(error).split())}. It is called with what the model returns "
                f"(a {type(output).__name__}), on the meta device."
            ) from error
        if not isinstance(found, Tensor) or found.numel() != 1:
            what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise TPError(f"`loss_fn` returned {what}; it has to be a scalar, such as `.mean()` of it.")
        return found.reshape(())

    return loss


def _shapes(inputs: Any) -> Any:
    return tuple((tuple(t.shape), t.dtype) for t in tree_flatten(inputs)[0] if isinstance(t, Tensor))


def counted(inputs: Any) -> tuple[int, int, str]:
    """(samples, tokens, "tokens") of the inputs; (samples, samples, "samples") where there are no tokens."""
    tensors = [t for t in tree_flatten(inputs)[0] if isinstance(t, Tensor) and t.ndim]
    tokens = next((t for t in tensors if t.ndim == 2 and not t.is_floating_point() and t.dtype != torch.bool), None)
    if tokens is not None:
        return tokens.shape[0], tokens.numel(), "tokens"
    samples = tensors[0].shape[0] if tensors else 1
    return samples, samples, "samples"
