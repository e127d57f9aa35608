"""A training script as TARGET: it runs in this process up to `Trainer.fit`, whose module and first batch are taken. Nothing is trained."""

from __future__ import annotations

import functools
import importlib.util
import logging
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_tp._compat import loaders_to_run
from lightning_tp.data.sample_batch import first_of, silence_logging
from lightning_tp.errors import TPError
from lightning_tp.estimate.rank.inputs import default_loss

LIGHTNINGS = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}


@dataclass(frozen=True)
class Reached:
    """What a script was about to train.

    Args:
        module: a LightningModule whose forward is its `training_step`, unless it has an `example_input_array`.
        inputs: what that forward is called with.
        loss_fn: the loss in what that gives.
        plan: of its strategy, if that was given one.
        batch: samples in a batch of its loader, if that says so.
    """

    module: nn.Module
    inputs: Any
    loss_fn: Callable[..., Tensor]
    plan: Any
    batch: int | None


class _Fit(BaseException):  # no Exception: scripts catch those
    """The script has called `Trainer.fit`."""

    def __init__(self, module: Any, example: Any, batch: int | None) -> None:
        self.module, self.example, self.batch = module, example, batch


def is_script(text: str) -> bool:
    """Whether a TARGET is a script, with arguments perhaps, and not a function in a file."""
    words = _words(text)
    return bool(words) and words[0].endswith(".py")


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # a quote without its end
        return []


def run_script(text: str, called: Callable[[Callable[[], Any], str], Any], *, weights: bool) -> Reached:
    """Run a script as `python script.py ..` does, on the CPU and by itself, until it trains.

    Args:
        text: its path, and its arguments as in a shell.
        called: runs a function of the user, and says its errors.
        weights: also where the script asks for none (`trainer.init_module(empty_init=True)`).

    Raises:
        TPError: if there is no such file, or it ends without `Trainer.fit`.
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
            with redirect_stdout(sys.stderr):  # what the command itself prints may be read by another
                called(lambda: runpy.run_path(path, run_name="__main__"), text)
    except _Fit as fit:
        return _reached(fit, plans[-1] if plans else None, text)
    raise TPError(
        f"`{text}` ran to its end without `Trainer.fit`, at which the model and its data would have been taken. Name a function in it that "
        f"returns (model, inputs), as in {path}:build."
    )


def _reached(fit: _Fit, plan: Any, text: str) -> Reached:
    module = fit.module
    own = module.example_input_array
    if own is not None:
        return Reached(module, own, default_loss, plan, None)
    if not module.automatic_optimization:
        raise TPError(
            f"`{text}`: {type(module).__name__} steps its optimizers by itself, so that its `training_step` can't be run alone. Set "
            "`example_input_array` on it, which says what its forward reads."
        )
    silence_logging(module)
    module.forward = _Step(module)
    batch = tree_map_only(Tensor, lambda t: t.detach().cpu(), fit.example)
    return Reached(module, (batch,), _step_loss, plan, fit.batch)


class _Step:
    """`training_step` as the forward of its module; what that itself calls is the forward that it has."""

    def __init__(self, module: Any) -> None:
        self.module, self.inside = module, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.inside:
            return type(self.module).forward(self.module, *args, **kwargs)
        self.inside = True
        try:
            out = self.module.training_step(args[0], 0)
        finally:
            self.inside = False
        if out is None:
            raise TPError(f"`training_step` of {type(self.module).__name__} returned no loss for the first batch.")
        return out


def _step_loss(out: Any) -> Tensor:
    """The loss in what a `training_step` returns."""
    loss: Tensor = out["loss"] if isinstance(out, dict) else out
    return loss


@contextmanager
def _stopped_at_fit(weights: bool, plans: list[Any]) -> Iterator[None]:
    """Every Trainer that is made meanwhile runs on one CPU process, and ends with `_Fit` where it would set the module up for training."""
    with ExitStack() as stack:
        for name in LIGHTNINGS:
            if importlib.util.find_spec(name.partition(".")[0]) is None:
                continue
            trainer = import_module(name).Trainer
            log = logging.getLogger(name)  # which devices there are, and advice: not about a run
            stack.callback(log.setLevel, log.level)
            log.setLevel(logging.WARNING)
            own = (trainer.__init__, trainer.fit)
            stack.enter_context(patch.object(trainer, "__init__", _alone(own[0], name, weights, plans)))
            stack.enter_context(patch.object(trainer, "fit", _without_traces(own[1], name)))
            for other in ("validate", "test", "predict"):  # before it trains
                stack.enter_context(patch.object(trainer, other, lambda *args, **kwargs: []))
            fabric = import_module(LIGHTNINGS[name]).Fabric
            stack.enter_context(patch.object(fabric, "launch", _refuse_fabric))
        yield


def _refuse_fabric(*args: Any, **kwargs: Any) -> None:
    raise TPError("a script with Fabric has a loop of its own. Name a function that returns (model, inputs), as in train.py:build.")


def _alone(init: Any, lightning: str, weights: bool, plans: list[Any]) -> Any:
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
            pass  # the module stays where it is

    @functools.wraps(init)
    def alone(self: Any, *args: Any, **kwargs: Any) -> None:
        plans.append(getattr(kwargs.get("strategy"), "plan", None))
        if kwargs.get("logger") in (None, True):  # or Lightning warns about loggers that are not installed
            kwargs["logger"] = False
        kwargs.update(accelerator="cpu", devices=1, num_nodes=1, strategy=Stop(torch.device("cpu")), precision=None, plugins=None)
        init(self, *args, **kwargs)

    return alone


def _without_traces(fit: Any, lightning: str) -> Any:
    dummy = import_module(f"{lightning}.loggers.logger").DummyLogger

    @functools.wraps(fit)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.loggers = [dummy()]  # which writes nothing, and starts no run anywhere
        return fit(self, *args[:4], **{k: v for k, v in kwargs.items() if k not in ("ckpt_path", "weights_only")})

    return run
