"""A checkpoint as a Hugging Face model: its config, its class on the meta device, and the tensors that this class writes.

transformers says which names and shapes the class has; no code of the checkpoint is run.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_tp.checkpoint.weights.file_names import slices_in_files, split_for_files
from lightning_tp.checkpoint.weights.matching import find_prefixes, listing, match_tensors, model_tensors, rename_prefix
from lightning_tp.checkpoint.weights.stored import StoredCheckpoint, StoredTensor
from lightning_tp.errors import TPError

HF_CONFIG = "lightning_tp_hf_config"  # in a checkpoint: where in the model a Hugging Face model is -> its config


def config_in(module: nn.Module) -> dict[str, Any]:
    """Return for each Hugging Face model inside (the outermost ones) where it is -> its config as plain data, with the class's name."""
    found: dict[str, Any] = {}
    for name, m in module.named_modules():
        if any(name.startswith(f"{p}.") if p else name for p in found) or not hasattr(getattr(m, "config", None), "to_json_string"):
            continue
        try:
            config = json.loads(m.config.to_json_string())
        except (TypeError, ValueError):
            continue
        if "model_type" in config:
            classes = (c for c in type(m).__mro__ if c.__module__.startswith(("transformers.", "transformers_modules")))
            found[name] = {**config, "architectures": [next(classes, type(m)).__name__]}
    return found


def as_hugging_face(
    contents: StoredCheckpoint, config: str | Path | None, prefix: str | None, dtype: torch.dtype | None
) -> tuple[Any, dict[str, StoredTensor]]:
    """Return a checkpoint's Hugging Face model, on the meta device, and the tensors by the names that it has in files; nothing is read.

    `config`, `prefix` and `dtype` are as for `export`. `TPError` if transformers is not installed, there is no config, or names and shapes are
    not those of its class.
    """
    data, prefix = find_config(contents, config, prefix)
    model = _build_on_meta(data)
    tensors = {name: stored.cast(dtype) for name, stored in select_tensors(model, contents, prefix).items()}
    return model, split_for_files(tensors, slices_in_files(model))


def save_config(model: Any, tensors: Mapping[str, StoredTensor], folder: Path) -> None:
    """Write `config.json` with the dtype of most tensors, and `generation_config.json` if the class generates."""
    dtypes = Counter(s.dtype for s in tensors.values() if s.dtype.is_floating_point)
    if dtypes:
        model.config.dtype = dtypes.most_common(1)[0][0]
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.save_pretrained(folder)


def find_config(contents: StoredCheckpoint, config: str | Path | None, prefix: str | None) -> tuple[dict[str, Any], str | None]:
    """Return the config of a checkpoint's Hugging Face model, and where it is, if known; `TPError` if there is none, or several."""
    if config is not None:
        return _read_config(Path(config)), prefix
    stored: Mapping[str, Any] = contents.rest.get(HF_CONFIG) or {}
    if prefix is not None and prefix in stored:
        return stored[prefix], prefix
    if len(stored) > 1:
        raise TPError(
            f"`{contents.path}` contains {len(stored)} Hugging Face models: {', '.join(repr(p) for p in stored)}. Choose one by `prefix`."
        )
    if stored and prefix is None:
        return next(((c, where) for where, c in stored.items()))
    if contents.kind == "safetensors" and contents.path.is_dir() and (contents.path / "config.json").is_file():
        return _read_config(contents.path), prefix
    hyper_parameters: Mapping[str, Any] = contents.rest.get("hyper_parameters") or {}
    for value in hyper_parameters.values():
        data = json.loads(value.to_json_string()) if hasattr(value, "to_json_string") else value
        if isinstance(data, dict) and "model_type" in data and data.get("architectures"):
            return data, prefix
    raise TPError(
        f"`{contents.path}` contains no config of a Hugging Face model{f' at {prefix!r}' if prefix else ''} (checkpoints of `TPStrategy` have it "
        "where the LightningModule holds one). Pass `config`, on the command line `--config path/to/config.json`."
    )


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        data: dict[str, Any] = json.loads(file.read_text())
        data["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TPError(f"`config={str(path)!r}` is no config of Hugging Face ({type(error).__name__}: {error}).") from None
    return data


def _build_on_meta(config: Mapping[str, Any]) -> Any:
    """Build the class that a config names, without memory."""
    try:
        import transformers
    except ImportError:
        raise TPError("`format='hf'` needs transformers: pip install 'lightning-tp[hf]'.") from None
    name = (config.get("architectures") or [""])[0]
    model_class: Any = getattr(transformers, name, None)
    if model_class is None:
        raise TPError(
            f"The config names the class {name!r}, which transformers {transformers.__version__} does not have"
            + (" (custom code is not run)" if config.get("auto_map") else "")
            + ". Pass a `config.json` whose `architectures` is one of its classes, or use `format='safetensors'`."
        )
    try:
        built = transformers.AutoConfig.for_model(**{k: v for k, v in config.items() if k != "transformers_version"})
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = model_class(built)
            model.tie_weights()
    except Exception as error:  # whatever transformers has to say about the config
        raise TPError(f"transformers can't build {name} from the config: {type(error).__name__}: {error}") from error
    return model


def select_tensors(model: nn.Module, contents: StoredCheckpoint, prefix: str | None) -> dict[str, StoredTensor]:
    """Return a checkpoint's tensors by the names of a model at `prefix` (default: where most names fit), tied ones once; warn of others.

    `TPError` if names or shapes differ.
    """
    tensors = model_tensors(model)
    wanted = {name: tensors.get(name, t) for name, t in model.state_dict().items()}
    if prefix is None:
        prefix = find_prefixes(contents.model, wanted)[0].removesuffix(".")
    start = f"{prefix}." if prefix else ""
    inside, outside = rename_prefix(contents.model, start, "")
    match = match_tensors(wanted, inside)
    name = type(model).__name__
    if problems := match.problems(prefix=start):
        raise TPError(
            f"`{contents.path}` does not contain the weights of a {name} as its config describes it (looked for at `{prefix or 'the top'}`): "
            f"{listing(problems, 6)}. Pass the right `config` and `prefix`; `format='safetensors'` writes any model with its own names."
        )
    if outside:
        warnings.warn(
            f"{len(outside)} tensors are outside of the {name} in `{prefix}` and are left out: {listing(outside, 4, ', ')}",
            stacklevel=4,
        )
    first: dict[int, str] = {}  # of tied tensors
    for n in match.found:
        first.setdefault(id(wanted[n]), n)
    return {n: match.found[n] for n in first.values()}
