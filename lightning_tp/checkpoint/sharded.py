"""Load a checkpoint folder into a sharded model and its optimizers: every rank reads what it holds, of full tensors.

The state dict holds DTensors over the 2D mesh (`shards/state_dict.py`), so a checkpoint can be loaded on another mesh. Layout as Lightning's
`ModelParallelStrategy`: a folder with `.metadata`, a file or more for each rank, `meta.pt` for the rest; here with `plan.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_tp.checkpoint.storage.dcp import dcp_load
from lightning_tp.checkpoint.storage.nested import replace_references
from lightning_tp.checkpoint.storage.path import SHARDED, StoragePath
from lightning_tp.checkpoint.storage.unpickle import SafeGlobals, read_metadata
from lightning_tp.errors import TPError
from lightning_tp.shards.optimizer_state import check_kind, load_optimizer_state
from lightning_tp.shards.shard import ParamShard


def load_model(model: nn.Module, folder: StoragePath, *, strict: bool = True, key: str = "state_dict") -> None:
    """Load this rank's shards of every parameter and buffer. A collective.

    Args:
        model: the sharded model, or the module around it.
        folder: the checkpoint, in which the model's name is `key`.
        strict: False leaves what the checkpoint lacks as it is, and passes over what the model lacks.

    Raises:
        TPError: if the checkpoint lacks one, has another shape for it, or has one that the model lacks.
    """
    metadata = read_metadata(folder).state_dict_metadata
    stored = {name.removeprefix(f"{key}."): entry for name, entry in metadata.items() if name.startswith(f"{key}.")}
    state = model.state_dict()
    extra = [name for name in stored if name not in state]
    for name, value in list(state.items()):
        entry = stored.get(name)
        if entry is None:
            if strict:
                raise TPError(f"`{folder}` has no `{name}`. Load with `strict_loading = False`, or use the model that wrote it.")
            del state[name]
        elif isinstance(entry, TensorStorageMetadata) and tuple(entry.size) != tuple(value.shape):
            raise TPError(f"`{name}`: `{folder}` has shape {tuple(entry.size)}, the model {tuple(value.shape)}.")
    if strict and extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise TPError(
            f"`{folder}` has `{extra[0]}`{more}, which the model lacks. Load with `strict_loading = False`, or use the model that wrote it."
        )
    dcp_load({key: state}, folder)
    model.load_state_dict(state, strict=strict)


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    folder: StoragePath,
    key: str,
    *,
    safe_globals: SafeGlobals = (),
    weights_only: bool | None = None,
) -> None:
    """Load this rank's shards of an optimizer's state, whose name in the checkpoint is `key` ("optimizer_0"). A collective.

    `safe_globals` and `weights_only` are as for `unpickle.load`. `TPError` if it is not there, or of another optimizer.
    """
    stored = read_metadata(folder).state_dict_metadata
    if not any(k.startswith(f"{key}.") for k in stored):
        raise TPError(
            f"`{folder}` has no `{key}`, so training can't be resumed from it: it was saved with weights only, or with fewer optimizers. Save "
            "with `ModelCheckpoint(save_weights_only=False)`; `trainer.validate`, `test` and `predict` load weights alone."
        )
    _check_groups(optimizer, folder, key, stored)
    state: dict[str, dict[str, Any]] = {}
    groups = []
    for i, group in enumerate(optimizer.param_groups):
        shards: list[ParamShard] = [p._tp_shard for p in group["params"]]
        for shard, p in zip(shards, group["params"]):
            prefix = f"{key}.state.{shard.name}."
            fields = {k.removeprefix(prefix): entry for k, entry in stored.items() if k.startswith(prefix)}
            if fields:
                state[shard.name] = {f: _memory_for(entry, shard, p.device) for f, entry in fields.items()}
        saved = {k: v for k, v in group.items() if f"{key}.param_groups.{i}.{k}" in stored}  # not what a scheduler has added since
        groups.append({**saved, "params": [shard.name for shard in shards]})
    loaded = {key: {"state": state, "param_groups": groups}}
    dcp_load(loaded, folder, safe_globals=safe_globals, weights_only=weights_only)
    load_optimizer_state(optimizer, loaded[key])


def _check_groups(optimizer: torch.optim.Optimizer, folder: StoragePath, key: str, stored: Mapping[str, Any]) -> None:
    """Check that the groups are those of this kind of optimizer, by the keys of the checkpoint, before anything is read."""
    prefix = f"{key}.param_groups."
    groups: dict[str, dict[str, Any]] = {}
    for name in stored:
        if name.startswith(prefix):
            number, _, field = name.removeprefix(prefix).partition(".")
            groups.setdefault(number, {})[field.partition(".")[0]] = None
    if groups and all(number.isdigit() for number in groups):
        try:
            check_kind(optimizer, list(groups.values()))
        except TPError as error:
            raise TPError(f"`{folder}`, `{key}`: {error}") from None


def _memory_for(entry: Any, shard: ParamShard | None, device: torch.device) -> Any:
    """Return what `dcp.load` reads a stored value into: a DTensor for what has a parameter's shape, else a full tensor, or None for other values."""
    if not isinstance(entry, TensorStorageMetadata):
        return None
    if shard is not None and tuple(entry.size) == shard.shape and shard.shape:
        return shard.to_dtensor(torch.empty(shard.local_shape, dtype=entry.properties.dtype, device=device))
    return torch.empty(entry.size, dtype=entry.properties.dtype)


def with_dtensors(tree: Any, folder: StoragePath, model: nn.Module) -> Any:
    """Undo `without_dtensors`: read what the references in a tree name. A collective.

    What has a parameter's name and shape becomes a DTensor of this mesh, anything else a full tensor.
    """
    names: dict[str, str] = {}
    replace_references(tree, names.setdefault)
    if not names:
        return tree
    stored = read_metadata(folder / SHARDED).state_dict_metadata
    parameters = {p._tp_shard.name: p for p in model.parameters() if hasattr(p, "_tp_shard")}
    values: dict[str, Any] = {}
    for path, name in names.items():
        p = parameters.get(name)
        shard, device = (p._tp_shard, p.device) if p is not None else (None, torch.device("cpu"))
        values[path] = _memory_for(stored[path], shard, device)
    dcp_load(values, folder / SHARDED)
    return replace_references(tree, lambda path, _: values[path])
