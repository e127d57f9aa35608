"""Save and load a sharded run through torch's distributed checkpoint: every rank writes what it holds, of global tensors.

The state dict holds DTensors over the 2D mesh (`border.py`), so a checkpoint can be loaded on another mesh. Layout as Lightning's
`ModelParallelStrategy`: a folder with `.metadata`, a file or more for each rank, `meta.pt` for the rest; here with `plan.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_tp.border import Shard, load_optimizer_state
from lightning_tp.errors import TPError


def load_model(model: nn.Module, path: Path, *, strict: bool = True, key: str = "state_dict") -> None:
    """Read this rank's pieces of every parameter and buffer from the folder, where `key` is the model's name in it.

    Raises:
        TPError: if the checkpoint lacks one, has another shape for it, or has one that the model has not.
    """
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
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
    dcp.load({key: state}, checkpoint_id=path)
    model.load_state_dict(state, strict=strict)


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path, key: str) -> None:
    """Read this rank's pieces of an optimizer's state from the folder, where `key` is its name in it ("optimizer_0")."""
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state: dict[str, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            shard: Shard = p._ltp
            prefix = f"{key}.state.{shard.name}."
            fields = {k.removeprefix(prefix): m for k, m in stored.items() if k.startswith(prefix)}
            if fields:
                state[shard.name] = {f: _template(shard, m, p.device) for f, m in fields.items()}
    groups = [
        {**{k: v for k, v in g.items() if k != "params"}, "params": [p._ltp.name for p in g["params"]]}
        for g in optimizer.param_groups
    ]
    loaded = {key: {"state": state, "param_groups": groups}}
    dcp.load(loaded, checkpoint_id=path)
    load_optimizer_state(optimizer, loaded[key])


def _template(shard: Shard, there: Any, device: torch.device) -> Any:
    """Memory for what the checkpoint has."""
    if not isinstance(there, TensorStorageMetadata):
        return None
    if tuple(there.size) == shard.shape and shard.shape:
        local = torch.empty(shard.local_shape, dtype=there.properties.dtype, device=device)
        return shard.to_dtensor(local)
    return torch.empty(there.size, dtype=there.properties.dtype)
