"""Find the plan of a LightningModule and apply it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_tp.data.sample_batch import first_batch, quiet
from lightning_tp.errors import TPError
from lightning_tp.infer.choose import default_plan
from lightning_tp.plan.checked import CheckedPlan
from lightning_tp.plan.plan import Plan

if TYPE_CHECKING:
    import lightning.pytorch as pl

STEPS = {"fit": "training_step", "validate": "validation_step", "test": "test_step", "predict": "predict_step"}


def plan_for_module(module: pl.LightningModule, trainer: pl.Trainer, tp: int) -> Plan:
    """The plan of a module that was given none: what the model inside declares, or what is inferred.

    To see that it runs, `default_plan` runs `forward` on `example_input_array` if the module has one, else its step on the first batch.

    Raises:
        TPError: if there is nothing to run it on, it can't be run, or nothing in it can be split.
    """
    call, inputs = _what_to_run(module, trainer)
    with quiet(module):
        found = default_plan(module, call, inputs, tp)
    checked = found.check(module, tp)
    if not checked.shards_anything:
        raise TPError(checked.why_nothing_is_sharded(module))
    return found


def _what_to_run(module: pl.LightningModule, trainer: pl.Trainer) -> tuple[Callable[[Any, Any], Any], Any]:
    """`(call, inputs)` so that `call(module, inputs)` runs it: its forward on its own example, or its step on the first batch."""
    example = module.example_input_array
    if example is not None:
        if isinstance(example, dict):
            return lambda m, x: m(**x), example
        return lambda m, x: m(*x), example if isinstance(example, tuple) else (example,)
    step = STEPS[str(trainer.state.fn.value) if trainer.state.fn is not None else "fit"]
    batch = tree_map_only(Tensor, lambda t: t.detach().cpu(), first_batch(trainer))
    return lambda m, x: getattr(m, step)(x, 0), batch


def _applied_to(module: nn.Module) -> CheckedPlan | None:
    """The plan that was applied to this module, or to one inside it."""
    return next((m._tp_applied_plan for m in module.modules() if hasattr(m, "_tp_applied_plan")), None)  # type: ignore[return-value]


def _not_followed(module: nn.Module, error: Exception) -> str:
    return (
        f"There is no plan for {type(module).__name__}, and following its step to find one ended with {type(error).__name__}: {error}. "
        "Set `example_input_array`, so that its forward is followed instead, or give a plan: `TPStrategy(plan=..)`."
    )


def _fsdp_root(module: pl.LightningModule) -> nn.Module:
    """The module that a step calls: the one child that has all the parameters, else the LightningModule itself."""
    if next(module.parameters(recurse=False), None) is not None:
        return module
    children = [child for child in module.children() if next(child.parameters(), None) is not None]
    return children[0] if len(children) == 1 else module
