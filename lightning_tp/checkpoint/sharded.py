"""A sharded run in torch's distributed checkpoint: every rank reads what it holds, of global tensors.

The state dict holds DTensors over the 2D mesh (`border.py`), so a checkpoint can be loaded on another mesh. Layout as Lightning's
`ModelParallelStrategy`: a folder with `.metadata`, a file or more for each rank, `meta.pt` for the rest; here with `plan.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from lightning_tp.checkpoint.commit import ELSEWHERE  # in the place of a DTensor: its key in the folder of that name
from lightning_tp.checkpoint.safe import SafeGlobals, dcp_load, read_metadata
from lightning_tp.checkpoint.storage import StoragePath
from lightning_tp.errors import TPError
from lightning_tp.shards.optimizer_state import check_kind, load_optimizer_state
from lightning_tp.shards.shard import ParamShard


def load_model(model: nn.Module, path: Path | StoragePath, *, strict: bool = True, key: str = "state_dict") -> None:
    """Read this rank's pieces of every parameter and buffer from the folder, where `key` is the model's name in it.

    Raises:
        TPError: if the checkpoint lacks one, has another shape for it, or has one that the model has not.
    """
    folder = _place(path)
    stored = read_metadata(folder).state_dict_metadata
    state = model.state_dict()
    for name, value in list(state.items()):
        there = stored.get(f"{key}.{name}")
        if there is None:
            if strict:
                raise TPError(f"`{path}` has no `{name}`. Load with `strict_loading = False`, or use the model that wrote it.")
            del state[name]
        elif isinstance(there, TensorStorageMetadata) and tuple(there.size) != tuple(value.shape):
            raise TPError(f"`{name}`: `{path}` has the shape {tuple(there.size)}, the model {tuple(value.shape)}.")
    names = {f"{key}.{name}" for name in model.state_dict()}
    extra = [k.removeprefix(f"{key}.") for k in stored if k.startswith(f"{key}.") and k not in names]
    if strict and extra:
        raise TPError(
            f"`{path}` has `{extra[0]}`"
            + (f" and {len(extra) - 1} more" if len(extra) > 1 else "")
            + ", which the model has not. Load "
            "with `strict_loading = False`, or use the model that wrote it."
        )
    dcp_load({key: state}, folder)
    model.load_state_dict(state, strict=strict)


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    path: Path | StoragePath,
    key: str,
    *,
    safe_globals: SafeGlobals = (),
    weights_only: bool | None = None,
) -> None:
    """Read this rank's pieces of an optimizer's state from the folder, where `key` is its name in it ("optimizer_0").

    Values that are no tensors are plain data, or of `safe_globals`, unless `weights_only=False`.

    Raises:
        TPError: if it is not there, or of another optimizer.
    """
    folder = _place(path)
    stored = read_metadata(folder).state_dict_metadata
    if not any(k.startswith(f"{key}.") for k in stored):
        raise TPError(
            f"`{path}` has no `{key}`, so training can't go on from it: it was saved with weights only, or with fewer optimizers. Save with "
            "`ModelCheckpoint(save_weights_only=False)`; weights alone are read by `trainer.validate`, `test` and `predict`."
        )
    _check_groups(optimizer, folder, key, stored)
    state: dict[str, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            shard: ParamShard = p._tp_shard
            prefix = f"{key}.state.{shard.name}."
            fields = {k.removeprefix(prefix): m for k, m in stored.items() if k.startswith(prefix)}
            if fields:
                state[shard.name] = {f: _template(shard, m, p.device) for f, m in fields.items()}
    groups = [
        {
            **{
                k: v for k, v in g.items() if k != "params" and f"{key}.param_groups.{i}.{k}" in stored
            },  # not what a scheduler added since
            "params": [p._tp_shard.name for p in g["params"]],
        }
        for i, g in enumerate(optimizer.param_groups)
    ]
    loaded = {key: {"state": state, "param_groups": groups}}
    dcp_load(loaded, folder, safe_globals=safe_globals, weights_only=weights_only)
    load_optimizer_state(optimizer, loaded[key])


def _check_groups(optimizer: torch.optim.Optimizer, folder: StoragePath, key: str, stored: Mapping[str, Any]) -> None:
    """By what the folder says of its groups, before anything is read."""
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


def _template(shard: ParamShard, there: Any, device: torch.device) -> Any:
    """Memory for what the checkpoint has."""
    if not isinstance(there, TensorStorageMetadata):
        return None
    if tuple(there.size) == shard.shape and shard.shape:
        local = torch.empty(shard.local_shape, dtype=there.properties.dtype, device=device)
        return shard.to_dtensor(local)
    return torch.empty(there.size, dtype=there.properties.dtype)


def without_dtensors(tree: Any, found: dict[str, DTensor], where: str = "") -> Any:
    """The same nesting of dicts and lists, with a mark in the place of each DTensor, which goes to `found`.

    Of what callbacks and hooks put into a checkpoint one rank writes all; it has but its shards of a DTensor.
    """
    if isinstance(tree, DTensor):
        found[where] = tree
        return {ELSEWHERE: where, "name": where.rpartition("/")[2]}
    if isinstance(tree, dict):
        values = {k: without_dtensors(v, found, f"{where}/{k}") for k, v in tree.items()}
        return values if any(v is not tree[k] for k, v in values.items()) else tree
    if type(tree) in (list, tuple):
        items = [without_dtensors(v, found, f"{where}/{i}") for i, v in enumerate(tree)]
        return type(tree)(items) if any(a is not b for a, b in zip(items, tree, strict=True)) else tree
    return tree


def with_dtensors(tree: Any, path: Path | StoragePath, model: nn.Module, *, no_dist: bool = False) -> Any:
    """The inverse: reads what is marked from the folder; as a DTensor of this mesh what has a parameter's name and shape, else whole."""
    marks: dict[str, str] = {}
    _find_marks(tree, marks)
    if not marks:
        return tree
    folder = _place(path) / ELSEWHERE
    stored = read_metadata(folder).state_dict_metadata
    parameters = {p._tp_shard.name: p for p in model.parameters() if hasattr(p, "_tp_shard")}
    values: dict[str, Any] = {}
    for where, name in marks.items():
        there: Any = stored[where]
        p = parameters.get(name)
        values[where] = (
            torch.empty(there.size, dtype=there.properties.dtype) if p is None else _template(p._tp_shard, there, p.device)
        )
    dcp_load(values, folder, no_dist=no_dist)
    return _fill_marks(tree, values)


def _place(path: Path | StoragePath) -> StoragePath:
    return path if isinstance(path, StoragePath) else StoragePath(path)


def _find_marks(tree: Any, found: dict[str, str]) -> None:
    if isinstance(tree, dict) and ELSEWHERE in tree:
        found[tree[ELSEWHERE]] = tree["name"]
    elif isinstance(tree, (dict, list, tuple)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            _find_marks(value, found)


def _fill_marks(tree: Any, values: dict[str, Any]) -> Any:
    if isinstance(tree, dict) and ELSEWHERE in tree:
        return values[tree[ELSEWHERE]]
    if type(tree) is dict:
        return {k: _fill_marks(v, values) for k, v in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_fill_marks(v, values) for v in tree)
    return tree
