"""A training script as TARGET: it runs in this process up to `Trainer.fit`, whose module and first batch are used. Nothing is trained."""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
import runpy
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from lightning_tp._compat import loaders_to_run
from lightning_tp.cli.targets.target import Target, call_user_code, plan_of_module
from lightning_tp.core.trees import map_tensors
from lightning_tp.data.sample_batch import first_of, silence_logging
from lightning_tp.errors import TPError
from lightning_tp.estimate.rank.inputs import default_loss
from lightning_tp.verify.training import as_inputs

LIGHTNINGS = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}


class _Fit(BaseException):  # no Exception, because scripts catch those
    """The end of a script that has called `Trainer.fit`."""

    def __init__(self, module: Any, example: Any, batch: int | None) -> None:
        self.module, self.example, self.batch = module, example, batch


def is_script(text: str) -> bool:
    """Return whether a TARGET is a script, possibly with arguments, and not a function in a file."""
    words = _words(text)
    return bool(words) and words[0].endswith(".py")


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # a quote that is not closed
        return []


def load_script(text: str, *, weights: bool) -> Target:
    """Run a script as `python script.py ..` does, in a single process on the CPU, until it trains.

    `weights` builds the model with weights even if the script asks for none (`trainer.init_module(empty_init=True)`).
    """
    path, *arguments = _words(text)
    if not Path(path).is_file():
        raise TPError(f"`{text}`: there is no file {path}.")
    plans: list[Any] = []
    try:
        with (
            _stopped_at_fit(weights, plans),
            patch.object(sys, "argv", [path, *arguments]),
            patch.object(sys, "path", list(sys.path)),
        ):
            sys.path.insert(0, str(Path(path).resolve().parent))
            torch.manual_seed(0)
            with redirect_stdout(sys.stderr):  # stdout is for the command, and may be parsed
                call_user_code(lambda: runpy.run_path(path, run_name="__main__"), text)
    except _Fit as fit:
        return _target(fit, plans[-1] if plans else None, text)
    raise TPError(
        f"`{text}` ran to its end without `Trainer.fit`, where its model and data would have been used. Name a function in it that returns "
        f"(model, inputs), such as {path}:build."
    )


def _target(fit: _Fit, plan: Any, text: str) -> Target:
    """Take the module that was about to be trained; its forward is its `training_step`, unless it has an `example_input_array`."""
    module = fit.module
    plan = plan if plan is not None else plan_of_module(module)
    example = module.example_input_array
    if example is not None:
        return Target(lambda: copy.deepcopy(module), module, as_inputs(example), default_loss, plan)
    if not module.automatic_optimization:
        raise TPError(
            f"`{text}`: {type(module).__name__} steps its optimizers by itself (manual optimization), so its `training_step` cannot be run "
            "alone. Set `example_input_array` on it, with which its forward can be called."
        )
    silence_logging(module)
    module.forward = _TrainingStep(module)
    batch = map_tensors(lambda t: t.detach().cpu(), fit.example)
    return Target(lambda: copy.deepcopy(module), module, (batch,), _step_loss, plan, fit.batch)


class _TrainingStep:
    """The `training_step` of a module in place of its forward; the calls of forward inside of it run the module's own."""

    def __init__(self, module: Any) -> None:
        self.module, self.is_running = module, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_running:
            return type(self.module).forward(self.module, *args, **kwargs)
        self.is_running = True
        try:
            out = self.module.training_step(args[0], 0)
        finally:
            self.is_running = False
        if out is None:
            raise TPError(f"`training_step` of {type(self.module).__name__} returned no loss for the first batch.")
        return out


def _step_loss(out: Any) -> Any:
    """Return the loss from what a `training_step` returns."""
    return out["loss"] if isinstance(out, dict) else out


@contextmanager
def _stopped_at_fit(weights: bool, plans: list[Any]) -> Iterator[None]:
    """Let every Trainer run in this process on the CPU, and raise `_Fit` where it would set the module up for training."""
    with ExitStack() as stack:
        for name in LIGHTNINGS:
            if importlib.util.find_spec(name.partition(".")[0]) is None:
                continue
            trainer = import_module(name).Trainer
            log = logging.getLogger(name)  # it logs devices and advice, which are not about this run
            stack.callback(log.setLevel, log.level)
            log.setLevel(logging.WARNING)
            stack.enter_context(patch.object(trainer, "__init__", _init_in_one_process(trainer.__init__, name, weights, plans)))
            stack.enter_context(patch.object(trainer, "fit", _fit_without_loggers(trainer.fit, name)))
            for other in ("validate", "test", "predict"):  # that the script calls before it trains
                stack.enter_context(patch.object(trainer, other, lambda *args, **kwargs: []))
            fabric = import_module(LIGHTNINGS[name]).Fabric
            stack.enter_context(patch.object(fabric, "launch", _refuse_fabric))
        yield


def _refuse_fabric(*args: Any, **kwargs: Any) -> None:
    raise TPError(
        "a script with Fabric has its own training loop. Name a function that returns (model, inputs), such as train.py:build."
    )


def _init_in_one_process(init: Any, lightning: str, weights: bool, plans: list[Any]) -> Any:
    strategies = import_module(f"{lightning}.strategies")

    class Stop(strategies.SingleDeviceStrategy):  # type: ignore[name-defined]
        def tensor_init_context(self, empty_init: bool | None = None) -> Any:
            return torch.device("meta") if empty_init and not weights else super().tensor_init_context(False)

        def setup(self, trainer: Any) -> None:
            with torch.random.fork_rng([]):
                loader = loaders_to_run(trainer)
                example = None if trainer.lightning_module.example_input_array is not None else first_of(loader)
            raise _Fit(trainer.lightning_module, example, getattr(loader, "batch_size", None))

        def teardown(self) -> None:
            pass  # leave the module where it is

    @functools.wraps(init)
    def init_in_one_process(self: Any, *args: Any, **kwargs: Any) -> None:
        plans.append(getattr(kwargs.get("strategy"), "plan", None))
        if kwargs.get("logger") in (None, True):  # otherwise Lightning warns about loggers that are not installed
            kwargs["logger"] = False
        kwargs.update(accelerator="cpu", devices=1, num_nodes=1, strategy=Stop(torch.device("cpu")), precision=None, plugins=None)
        init(self, *args, **kwargs)

    return init_in_one_process


def _fit_without_loggers(fit: Any, lightning: str) -> Any:
    dummy = import_module(f"{lightning}.loggers.logger").DummyLogger

    @functools.wraps(fit)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.loggers = [dummy()]  # it writes nothing, and starts no run on a server
        return fit(self, *args[:4], **{k: v for k, v in kwargs.items() if k not in ("ckpt_path", "weights_only")})

    return run
