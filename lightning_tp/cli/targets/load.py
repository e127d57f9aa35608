"""Decide what a TARGET is, and load it; what is named by `module:name` is loaded here, scripts and configs by the files beside."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_tp.cli.targets.hugging_face import load_config
from lightning_tp.cli.targets.script import is_script, load_script
from lightning_tp.cli.targets.target import Target, call_user_code, import_user_module, plan_of_module
from lightning_tp.errors import TPError
from lightning_tp.estimate.rank.inputs import default_loss
from lightning_tp.verify.training import as_inputs


def load(text: str, *, weights: bool = False) -> Target:
    """Load the model, inputs and loss of a TARGET; with `weights`, the model is built on the CPU, whatever its size."""
    path = Path(text)
    if path.suffix == ".json":
        return load_config(path, weights=weights)
    if (path / "config.json").is_file():
        return load_config(path / "config.json", weights=weights)
    if path.is_dir():
        raise TPError(
            f"`{text}`: the folder has no config.json. Name the folder of a Hugging Face model, or path/to/file.py:function."
        )
    if is_script(text):
        return load_script(text, weights=weights)
    where, _, name = text.rpartition(":")
    if where.endswith(".py") and not name:
        raise TPError(f"`{text}`: name the function in it that returns (model, inputs), such as {where}:build.")
    if not where or not name:
        raise TPError(
            f"`{text}`: a TARGET is package.module:function, path/to/file.py:function, path/to/train.py, or path/to/config.json."
        )
    return load_function(text)


def load_function(text: str) -> Target:
    """Load `package.module:name` or `path/to/file.py:name`: a function, or a LightningModule with an `example_input_array`."""
    where, _, name = text.rpartition(":")
    module = import_user_module(where, text)
    found = getattr(module, name, None)
    if found is None:
        defined = [
            n for n, value in vars(module).items() if callable(value) and getattr(value, "__module__", "") == module.__name__
        ]
        names = ", ".join(n for n in defined if not n.startswith("_"))
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
