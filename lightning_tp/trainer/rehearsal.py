"""Run a step before training begins as if it had: with optimizers, with the batch that comes first, without loggers and without other ranks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lightning_tp._compat import fake_store, process_groups_aside
from lightning_tp.core.comm.fake_world import LoneCollectives
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.core.modules.objects import preserve_objects
from lightning_tp.core.modules.outer_calls import outer_calls
from lightning_tp.data.sample_batch import quiet
from lightning_tp.trainer.adapt.metrics import metrics_over_data_parallel
from lightning_tp.trainer.patches import private

STEPS = {"fit": "training_step", "validate": "validation_step", "test": "test_step", "predict": "predict_step"}
HOOKS = ("on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start")  # that may make what a step needs


class Rehearsal:
    """The step of a LightningModule that its Trainer is about to run, on one rank, before the module is split.

    Args:
        module: on the CPU.
        trainer: at the beginning of a run.
    """

    def __init__(self, module: pl.LightningModule, trainer: pl.Trainer) -> None:
        self.module, self.trainer = module, trainer
        self.called: set[str] = set()  # modules that it calls by themselves, once it has run
        self.name = STEPS[str(trainer.state.fn.value) if trainer.state.fn is not None else "fit"]

    @contextmanager
    def stage(self) -> Iterator[None]:
        """Set up what a step uses: optimizers, metrics, a mesh of the same shape whose collectives return at once."""
        trainer, strategy = self.trainer, getattr(self.trainer, "strategy", None)
        with ExitStack() as stack:
            around = [x for x in (trainer, strategy, getattr(trainer, "fit_loop", None)) if x is not None]
            saved = [(x, dict(vars(x))) for x in around]
            stack.callback(_restore_attributes, saved)
            stack.enter_context(self.preserved())
            stack.enter_context(quiet(self.module))
            stack.enter_context(private.said_to_be_on_cpu(self.module))
            stack.enter_context(torch.set_grad_enabled(self.name == "training_step"))
            if strategy is None:
                yield
                return
            if dist.is_initialized():
                stack.enter_context(process_groups_aside())
                size, mesh = trainer.world_size, strategy.device_mesh.mesh.shape
                dist.init_process_group("fake", store=fake_store(), rank=0, world_size=size)
                private.set_mesh(strategy, make_mesh("cpu", *mesh))
                stack.enter_context(LoneCollectives())
                stack.enter_context(metrics_over_data_parallel(trainer, strategy.device_mesh, self.module))
            strategy.process_dataloader = lambda loader: loader
            trainer.loggers = [DummyLogger() for _ in trainer.loggers]
            if trainer.state.fn == TrainerFn.FITTING:
                with suppress(Exception):  # it is said when they are made for good
                    self._make_optimizers()
            yield

    def _make_optimizers(self) -> None:
        strategy = self.trainer.strategy
        strategy.setup_optimizers(self.trainer)
        for optimizer in strategy.optimizers:
            optimizer.step = _only_closure  # type: ignore[method-assign]

    def preserved(self, *further: Any) -> Any:
        """A context that leaves as it was what the step reaches: the module, the callbacks, what functions close over, and `further`."""
        functions = [getattr(self.module, name, None) for name in (self.name, "forward")]
        roots = [self.module, *functions, *getattr(self.trainer, "callbacks", ()), *further]
        strategy = getattr(self.trainer, "strategy", None)
        return preserve_objects(roots, without=[self.trainer, strategy, *vars(self.trainer).values()])

    def prepared(self, batch: Any) -> Any:
        """The batch as the step is given it, on the CPU."""
        if not hasattr(self.trainer, "strategy"):
            return batch
        return private.transferred(self.trainer, self.module, batch)

    def call(self, module: nn.Module, batch: Any) -> Any:
        """Run the step; what it changes is changed back."""
        return self._run(module, batch)

    def call_after_hooks(self, module: nn.Module, batch: Any) -> Any:
        """Run the step, and before it the hooks of the module that come before the first one in training."""
        return self._run(module, batch, HOOKS)

    def _run(self, module: nn.Module, batch: Any, hooks: tuple[str, ...] = ()) -> Any:
        with self.preserved(batch), outer_calls(self.module) as called:
            for hook in hooks:
                with suppress(Exception):
                    getattr(module, hook)(*((batch, 0) if hook == HOOKS[-1] else ()))
            step = getattr(module, self.name)
            out = step(*step_arguments(step, batch))
        self.called |= called
        return out


def _only_closure(closure: Callable[[], Any] | None = None) -> Any:
    """In place of the `step` of an optimizer: weights stay."""
    with torch.enable_grad():
        return closure() if closure is not None else None


def _restore_attributes(saved: list[tuple[Any, dict[str, Any]]]) -> None:
    for x, attributes in saved:
        vars(x).clear()
        vars(x).update(attributes)


def step_arguments(step: Callable[..., Any], batch: Any) -> tuple[Any, ...]:
    """Return what Lightning calls a step with, by its signature: a batch and perhaps its index, or an iterator over batches."""
    parameters = inspect.signature(step).parameters
    if "dataloader_iter" in parameters:
        return (iter([(batch, 0, 0)]),)
    takes_index = len(parameters) > 1 or any(p.kind == p.VAR_POSITIONAL for p in parameters.values())
    return (batch, 0) if takes_index else (batch,)
