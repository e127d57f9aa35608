"""Load weights: each rank reads its slices of a Hugging Face folder, or of any other checkpoint, and nothing else.

`load_pretrained` is called before a model is sharded or after. Before, for a model on the meta device, it only looks at names and shapes;
`parallelize` then gives each rank memory for its shards and reads these.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lightning_tp._compat import ignored_by_transformers, local_tensor, patched
from lightning_tp.checkpoint.storage.path import METADATA
from lightning_tp.checkpoint.weights.dcp_folder import open_folder
from lightning_tp.checkpoint.weights.file_names import merge_from_files, slices_in_files
from lightning_tp.checkpoint.weights.matching import (
    Match,
    find_prefixes,
    listing,
    match_tensors,
    model_tensors,
    persistent_tensors,
    rename_prefix,
)
from lightning_tp.checkpoint.weights.open import open_checkpoint
from lightning_tp.checkpoint.weights.stored import StoredCheckpoint, StoredTensor
from lightning_tp.checkpoint.weights.torch_file import write_torch
from lightning_tp.core.boxes import narrow
from lightning_tp.errors import TPError
from lightning_tp.shards.state_dict import reshard

PENDING = "_tp_pretrained"  # attribute of a module on the meta device: name in it -> what is to be read once it is sharded


def load_pretrained(model: nn.Module, path: str | Path, *, strict: bool = True) -> nn.Module:
    """Load the weights of a Hugging Face folder (safetensors, in one file or several), or of any checkpoint that `export` reads.

    A sharded model reads its shards at once. One on the meta device reads them when it is sharded, by `parallelize` or a Trainer: build it under
    `init_on_meta`, call this, and no rank ever holds a full weight matrix that is sharded. Names may be deeper or less deep in the model
    than in the file (`self.model = AutoModel..` in a LightningModule); what is outside of that place, a head of your own, keeps its
    initial values. Numbers are converted to the dtype that the model has.

    Args:
        model: the model, or the LightningModule around it.
        path: the folder or file.
        strict: False leaves weights that the file lacks as they are, with a warning, and passes over what the model lacks.

    Returns:
        The same model.

    Raises:
        TPError: one, that lists what is missing, what is unexpected, and what has another shape; nothing is changed then.
    """
    path = Path(path)
    reshard(model)
    found = find_weights(model, open_checkpoint(path).model, path, strict=strict)
    tensors = model_tensors(model)
    meta = {name for name in found if tensors[name].is_meta}
    if any(hasattr(p, "_tp_shard") for p in model.parameters()) and meta:
        raise TPError(
            "`load_pretrained`: this model is sharded, but still on the meta device. Call it before the model is sharded."
        )
    if meta:
        model.__dict__[PENDING] = {n: s for n, s in found.items() if n in meta}
    read_shards(model, {n: s for n, s in found.items() if n not in meta})
    return model


def take_pending(model: nn.Module) -> dict[str, StoredTensor]:
    """Return what `load_pretrained` found for modules inside, by the names that it has in `model`, and forget it."""
    found: dict[str, StoredTensor] = {}
    for prefix, module in model.named_modules():
        for name, stored in module.__dict__.pop(PENDING, {}).items():
            found[f"{prefix}.{name}" if prefix else name] = stored
    return found


@torch.no_grad()
def read_shards(model: nn.Module, stored: Mapping[str, StoredTensor]) -> None:
    """Read this rank's boxes of each parameter, and full buffers. No collective."""
    if not stored:
        return
    reshard(model)
    tensors = model_tensors(model)
    names: dict[int, str] = {}
    for name in stored:
        names.setdefault(id(tensors[name]), name)  # tied ones once
    for name in names.values():
        t, source = tensors[name], stored[name]
        local = local_tensor(t.data if isinstance(t, nn.Parameter) else t)
        shard = getattr(t, "_tp_shard", None)
        if shard is None:
            local.copy_(source.read())
            continue
        for box, here in shard.boxes():
            narrow(local, here).copy_(source.read(box))


def find_weights(model: nn.Module, stored: Mapping[str, StoredTensor], path: Path, *, strict: bool) -> dict[str, StoredTensor]:
    """Return what a file has for a model, by its names; warn of what keeps its initial values; `TPError` if names or shapes differ."""
    wanted = persistent_tensors(model)
    slices = slices_in_files(model)
    strip, add = find_prefixes(stored, [*wanted, *(slices.keys() - wanted.keys())])
    renamed, not_renamed = rename_prefix(stored, strip, add)
    match = match_tensors(wanted, merge_from_files(renamed, slices))
    inside = [n for n in match.missing if n.startswith(add)]
    outside = [n for n in match.missing if not n.startswith(add)]
    unexpected = not_renamed + [n for n in match.unexpected if n not in model_tensors(model)]
    unexpected = [n for n in unexpected if not any(re.search(pattern, n) for pattern in ignored_by_transformers(model))]
    problems = Match(match.found, inside, unexpected, match.misshapen).problems(strict=strict)
    if not match.found and not match.misshapen:
        names = f"`{next(iter(stored), None)}` in the checkpoint, `{next(iter(wanted), None)}` in the model"
        problems = [f"no name is the same: {names}"]
    if problems:
        hint = "" if match.misshapen or not match.found else "`strict=False` loads what fits. "
        raise TPError(f"`{path}` does not fit {type(model).__name__}: {listing(problems, 6)}. {hint}Nothing was changed.")
    if lacking := inside + outside:
        warnings.warn(
            f"`{path}` lacks {len(lacking)} tensors of the model, which keep their initial values: {listing(lacking, 4, ', ')}",
            stacklevel=3,
        )
    return match.found


def load_from_checkpoint(cls: Any, path: str | Path, **kwargs: Any) -> Any:
    """Load a checkpoint that is a folder as `cls.load_from_checkpoint(path)` loads a file: a module in one process, read tensor by tensor.

    With `lightning_tp` imported, `cls.load_from_checkpoint(path)` comes here by itself.

    Args:
        cls: the LightningModule's class.
        path: the folder; a file is left to Lightning.
        **kwargs: as of `LightningModule.load_from_checkpoint`: `map_location`, `hparams_file`, `strict`, `weights_only`, and arguments of
            the class's own.

    Raises:
        TPError: if weights are missing or unexpected (unless `strict=False`), or of another shape.
    """
    path = Path(path)
    if not (path / METADATA).is_file():
        if path.is_dir():
            open_checkpoint(path)  # says what it is instead
        return cls.load_from_checkpoint(path, **kwargs)
    contents = open_folder(path, weights_only=kwargs.get("weights_only") is not False)
    if _looks_at_weights(cls):
        return cls.load_from_checkpoint(_as_file(contents, contents.model), **kwargs)
    undo = patched(cls, "load_state_dict", lambda *_, **__: SimpleNamespace(missing_keys=[], unexpected_keys=[]))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The state dict in")
            module = cls.load_from_checkpoint(_as_file(contents, {}), **kwargs)
    finally:
        undo()
    if isinstance(device := kwargs.get("map_location"), (str, torch.device)):
        module = module.to(device)
    match = match_tensors({n: t.detach() for n, t in persistent_tensors(module).items()}, contents.model)  # each name, ties or not
    if problems := match.problems(strict=module.strict_loading):
        raise TPError(f"`{path}` does not fit {cls.__name__}: {listing(problems, 6)}. `strict=False` loads what fits.")
    read_shards(module, match.found)
    return module


def _looks_at_weights(cls: Any) -> bool:
    """Return whether a LightningModule's own code sees the state dict when it is loaded."""
    is_lightnings = [c.__module__.startswith(("lightning.pytorch", "pytorch_lightning")) for c in cls.__mro__]
    own = cls.__mro__[: is_lightnings.index(True)]
    return any(name in vars(c) for c in own for name in ("on_load_checkpoint", "load_state_dict"))


def _as_file(contents: StoredCheckpoint, weights: Mapping[str, StoredTensor]) -> io.BytesIO:
    """Return a checkpoint with these weights as one file in memory, without optimizers."""
    file = io.BytesIO()
    write_torch({**contents.rest, "state_dict": dict(weights)}, file)
    file.seek(0)
    return file
