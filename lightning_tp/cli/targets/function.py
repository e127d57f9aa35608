"""A function that returns (model, inputs) or (model, inputs, loss_fn), or a LightningModule with an `example_input_array`, as TARGET."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from lightning_tp.cli.targets.target import Target, plan_of_module
from lightning_tp.cli.targets.user_code import call_user_code, import_user_module
from lightning_tp.errors import TPError
from lightning_tp.estimate.rank.inputs import default_loss
from lightning_tp.verify.training import as_inputs


def load_function(text: str) -> Target:
    """Load `package.module:name` or `path/to/file.py:name`.

    Raises:
        TPError: If there is no such name, or it is or returns something else.
    """
    where, _, name = text.rpartition(":")
    module = import_user_module(where, text)
    found = getattr(module, name, None)
    if found is None:
        own = [n for n, value in vars(module).items() if callable(value) and getattr(value, "__module__", "") == module.__name__]
        names = ", ".join(n for n in own if not n.startswith("_"))
        raise TPError(f"`{text}`: {where} has no `{name}`." + (f" It has {names}." if names else ""))
    if inspect.isclass(found) and issubclass(found, nn.Module):
        return _from_class(found, text)
    if isinstance(found, nn.Module) or not callable(found):
        raise TPError(f"`{text}` is a {type(found).__name__}. Name a function without arguments that returns (model, inputs).")
    return _from_function(found, text)


def _from_function(function: Any, text: str) -> Target:
    def call() -> tuple[Any, ...]:
        found = call_user_code(function, text)
        if not isinstance(found, tuple) or len(found) not in (2, 3) or not isinstance(found[0], nn.Module):
            raise TPError(f"`{text}` returned a {type(found).__name__}; it has to be (model, inputs) or (model, inputs, loss_fn).")
        if len(found) == 3 and found[2] is not None and not callable(found[2]):
            raise TPError(
                f"`{text}`: the third value is a {type(found[2]).__name__}; it has to be a function from the output to a scalar."
            )
        return found

    torch.manual_seed(0)
    model, inputs, *loss = call()
    loss_fn = loss[0] if loss and loss[0] is not None else default_loss
    return Target(lambda: call()[0], model, as_inputs(inputs), loss_fn, plan_of_module(model))


def _from_class(cls: type[nn.Module], text: str) -> Target:
    def build() -> nn.Module:
        model: nn.Module = call_user_code(cls, text)
        configure = getattr(model, "configure_model", None)
        if configure is not None and not list(model.parameters()):
            call_user_code(configure, text)
        return model

    torch.manual_seed(0)
    model = build()
    inputs = getattr(model, "example_input_array", None)
    if inputs is None:
        raise TPError(
            f"`{text}`: {cls.__name__} has no `example_input_array`, with which its forward could be called. Set it, or name a function "
            "that returns (model, inputs)."
        )
    return Target(build, model, as_inputs(inputs), default_loss, plan_of_module(model))
