"""Load what a command is about: a model in a Python file, a training script, a Hugging Face config."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tp.cli.script import is_script, run_script
from lightning_tp.errors import TPError
from lightning_tp.estimate.rank.inputs import default_loss
from lightning_tp.plan.plan import Plan
from lightning_tp.verify.verify import Inputs

SMALL = 20_000_000  # parameters, up to which a model of a config.json is built with weights


TOKENS = (2, 32)  # the made-up batch of a config.json


@dataclass(frozen=True)
class Target:
    """What a TARGET stands for.

    Args:
        build: makes the model anew.
        model: one such model, perhaps on the meta device.
        inputs: what its forward is called with.
        loss_fn: a scalar from its output, or from (output, inputs).
        plan: that the model has as an attribute, as a LightningModule may, or its strategy.
        batch: samples that it is trained on at once, where that is known.
    """

    build: Callable[[], nn.Module]
    model: nn.Module
    inputs: Inputs
    loss_fn: Callable[..., Tensor]
    plan: Any = None
    batch: int | None = None


def load(text: str, *, weights: bool = False) -> Target:
    """The model, inputs and loss of a TARGET; with `weights`, on the CPU whatever its size.

    Raises:
        TPError: if there is no such thing, or it returns something else.
    """
    path = Path(text)
    if path.suffix == ".json" or (path / "config.json").is_file():
        return _hugging_face(path if path.suffix == ".json" else path / "config.json", weights)
    where, colon, name = text.rpartition(":")
    if path.is_dir():
        raise TPError(
            f"`{text}`: the folder has no config.json. A TARGET is that of a Hugging Face model, or path/to/file.py:function."
        )
    if is_script(text):
        return _script(text, weights)
    if where.endswith(".py") and not name:
        raise TPError(f"`{text}`: name the function in it that returns (model, inputs), as in {where}:build.")
    if not colon or not where or not name:
        raise TPError(
            f"`{text}`: a TARGET is package.module:function, path/to/file.py:function, path/to/train.py, or path/to/config.json."
        )
    module = _module(where, text)
    made = getattr(module, name, None)
    if made is None:
        near = [
            n
            for n, v in vars(module).items()
            if callable(v) and not n.startswith("_") and getattr(v, "__module__", "") == module.__name__
        ]
        raise TPError(f"`{text}`: {where} has no `{name}`." + (f" It has {', '.join(near)}." if near else ""))
    if inspect.isclass(made) and issubclass(made, nn.Module):
        return _lightning_module(made, text)
    if isinstance(made, nn.Module) or not callable(made):
        raise TPError(f"`{text}` is a {type(made).__name__}. Name a function without arguments that returns (model, inputs).")

    def call() -> tuple[Any, ...]:
        found = _called(made, text)
        if not isinstance(found, tuple) or len(found) not in (2, 3) or not isinstance(found[0], nn.Module):
            raise TPError(f"`{text}` returned a {type(found).__name__}; it has to be (model, inputs) or (model, inputs, loss_fn).")
        if len(found) == 3 and found[2] is not None and not callable(found[2]):
            raise TPError(
                f"`{text}`: the third value is a {type(found[2]).__name__}; it has to be a function of the output: a scalar."
            )
        return found

    torch.manual_seed(0)
    model, inputs, *loss = call()
    return Target(
        lambda: call()[0], model, _as_inputs(inputs), loss[0] if loss and loss[0] is not None else default_loss, _own_plan(model)
    )


def _script(text: str, weights: bool) -> Target:
    reached = run_script(text, _called, weights=weights)
    return Target(
        lambda: copy.deepcopy(reached.module),
        reached.module,
        _as_inputs(reached.inputs),
        reached.loss_fn,
        reached.plan if reached.plan is not None else _own_plan(reached.module),
        reached.batch,
    )


def _module(where: str, text: str) -> Any:
    if not where.endswith(".py"):
        if "" not in sys.path and str(Path.cwd()) not in sys.path:  # as `python -m` has it; a console script does not
            sys.path.insert(0, str(Path.cwd()))
        return _called(lambda: importlib.import_module(where), text)
    path = Path(where).resolve()
    if not path.is_file():
        raise TPError(f"`{text}`: there is no file {where}.")
    if str(path.parent) not in sys.path:  # as `python file.py` has it
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module  # dataclasses look for it there
    try:
        _called(lambda: loader.exec_module(module), text)
    except TPError:
        sys.modules.pop(path.stem)
        if before is not None:
            sys.modules[path.stem] = before
        raise
    return module


def _called(fn: Callable[[], Any], text: str) -> Any:
    """What the user's code returns; an error of it in one line, with the place."""
    try:
        return fn()
    except TPError:
        raise
    except SystemExit as error:
        raise TPError(f"`{text}`: its code leaves Python, with sys.exit({error.code!r}).") from error
    except Exception as error:
        frame, tb = "", error.__traceback__
        while tb is not None:
            name = tb.tb_frame.f_code.co_filename
            if not any(part in name for part in ("lightning_tp", "importlib", "site-packages")):  # the user's own
                frame = f" ({name}, line {tb.tb_lineno})"
            tb = tb.tb_next
        raise TPError(f"`{text}`: {type(error).__name__}: {error}{frame}") from error


def _lightning_module(made: type[nn.Module], text: str) -> Target:
    def build() -> nn.Module:
        model = _called(made, text)
        configure = getattr(model, "configure_model", None)
        if configure is not None and not list(model.parameters()):
            _called(configure, text)
        return model

    torch.manual_seed(0)
    model = build()
    inputs = getattr(model, "example_input_array", None)
    if inputs is None:
        raise TPError(
            f"`{text}`: {made.__name__} has no `example_input_array`, which says what its forward reads. Set it, or name a "
            "function that returns (model, inputs)."
        )
    return Target(build, model, _as_inputs(inputs), default_loss, _own_plan(model))


def _own_plan(model: nn.Module) -> Any:
    plan = getattr(model, "plan", None)
    return plan if isinstance(plan, (Plan, Mapping, str, Path)) else None


def _as_inputs(inputs: Any) -> Inputs:
    if isinstance(inputs, Mapping):
        return dict(inputs)
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def _hugging_face(path: Path, weights: bool) -> Target:
    """A model of transformers: on the meta device if it is large, with tokens made up."""
    if not path.is_file():
        raise TPError(f"`{path}`: there is no such file.")
    try:
        import transformers
    except ImportError:
        raise TPError(f"`{path}`: a Hugging Face model needs transformers: pip install 'lightning-tp[hf]'.") from None
    transformers.logging.set_verbosity_error()  # what it finds unusual in a config changes nothing here
    config: Any = _called(lambda: transformers.AutoConfig.from_pretrained(str(path)), str(path))
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    auto: Any = transformers.AutoModelForCausalLM if causal else transformers.AutoModel

    def build(**options: Any) -> nn.Module:
        model: nn.Module = _called(lambda: auto.from_config(config, **options), str(path))
        return model

    def build_for_real() -> nn.Module:
        return build(dtype=torch.float32)

    with torch.device("meta"):
        model = build()
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise TPError(
            f"`{path}`: {type(model).__name__} reads `{model.main_input_name}`, not tokens. Name a function that returns "
            "(model, inputs)."
        )
    text_config = config.get_text_config()
    length = min(TOKENS[1], getattr(text_config, "max_position_embeddings", None) or TOKENS[1])
    small = sum(p.numel() for p in model.parameters()) <= SMALL
    if weights or small:
        torch.manual_seed(0)
        model = build_for_real() if weights else build()
    device = next(model.parameters()).device
    ids = torch.randint(0, text_config.vocab_size, (TOKENS[0], length), generator=torch.Generator().manual_seed(0)).to(device)
    inputs: dict[str, Any] = {"input_ids": ids}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    else:
        inputs["use_cache"] = False
    if causal:
        inputs["labels"] = ids
    return Target(build_for_real, model, inputs, default_loss)
