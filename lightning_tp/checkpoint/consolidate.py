"""One file of a folder: what a Trainer without this package resumes from.

Tensors go through files beside the result that are mapped into memory, one at a time, so that no more than one of them stands in memory of its
own, however large the model is; the disk has to hold the tensors twice for that long.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_tp.checkpoint.commit import META, save_file
from lightning_tp.checkpoint.find import choose
from lightning_tp.checkpoint.place import Place
from lightning_tp.checkpoint.safe import SafeGlobals, dcp_load, load, read_metadata
from lightning_tp.checkpoint.sharded import with_dtensors
from lightning_tp.checkpoint.world import World
from lightning_tp.errors import TPError

_OF_LISTS = ("param_groups",)  # what torch's planner numbers in a state dict of an optimizer


def consolidate(
    folder: str | os.PathLike[str],
    file: str | os.PathLike[str],
    *,
    safe_globals: SafeGlobals = (),
    weights_only: bool | None = None,
) -> None:
    """Write a checkpoint folder as one file in Lightning's format: weights, optimizers, schedulers, loops and all.

    By one process; needs no process group, no model and no GPU. `L.Trainer().fit(module, ckpt_path=file)` goes on from it in one process; so does a
    Trainer with any strategy, this package's too.

    Args:
        folder: that `TPStrategy` has written, or Lightning's `ModelParallelStrategy`.
        file: what to write; it is there once it is complete.
        safe_globals: classes of your own that the checkpoint may have in it.
        weights_only: False trusts whoever wrote the checkpoint, and runs what is in it.

    Raises:
        TPError: if the folder is damaged, or is none.
    """
    source, target = Place(folder), Place(file)
    if not source.is_dir():
        raise TPError(f"`{folder}` is no folder of a checkpoint.")
    source, _ = choose(source, World(alone=True))
    rest: dict[str, Any] = load(source / META, safe_globals=safe_globals, weights_only=weights_only)
    os.makedirs(os.path.dirname(os.path.abspath(target.path)), exist_ok=True)
    beside = tempfile.mkdtemp(
        prefix=".lightning_tp-", dir=os.path.dirname(os.path.abspath(target.path)) if target.is_local else None
    )
    try:
        tree = _read(source, beside, safe_globals, weights_only)
        rest = with_dtensors(rest, source, torch.nn.Module(), no_dist=True)
        rest["state_dict"] = tree.pop("state_dict", {})
        states = [tree.pop(f"optimizer_{i}") for i in range(len(tree)) if f"optimizer_{i}" in tree]
        if states:
            rest["optimizer_states"] = [_in_order(state) for state in states]
        rest.update(tree)  # what Fabric was given under other names
        save_file(target, lambda stream: torch.save(rest, stream))
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _read(source: Place, beside: str, safe_globals: SafeGlobals, weights_only: bool | None) -> dict[str, Any]:
    """The nested state dict of a folder, with tensors in mapped files."""
    metadata = read_metadata(source)
    tree: dict[str, Any] = {}
    for i, (key, of) in enumerate(metadata.state_dict_metadata.items()):
        state: dict[str, Any] = {key: None}
        if isinstance(of, TensorStorageMetadata):
            state = {key: _mapped(of, os.path.join(beside, str(i)))}
        dcp_load(state, source, safe_globals=safe_globals, weights_only=weights_only, no_dist=True)
        _put(tree, (metadata.planner_data or {}).get(key, (key,)), state[key])
    return {k: _lists(v) for k, v in tree.items()}


def _mapped(of: TensorStorageMetadata, path: str) -> Tensor:
    if not of.size.numel():
        return torch.empty(of.size, dtype=of.properties.dtype)
    flat = torch.from_file(path, shared=True, size=of.size.numel(), dtype=of.properties.dtype)
    return flat.view(of.size)


class _List(dict[Any, Any]):
    """A list whose items come one by one."""


def _put(tree: dict[Any, Any], path: tuple[Any, ...], value: Any) -> None:
    for key, after in itertools.pairwise(path):
        tree = tree.setdefault(key, _List() if isinstance(after, int) and key in _OF_LISTS else {})
    tree[path[-1]] = value


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        items = {k: _lists(v) for k, v in value.items()}
        return [items[i] for i in sorted(items)] if isinstance(value, _List) else items
    return value


def _in_order(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state as torch's optimizers have it in one process: groups in their order, parameters by number."""
    groups = state.get("param_groups", [])
    names = [name for group in groups for name in group["params"]]
    number = {name: i for i, name in enumerate(names)}
    return {
        "state": {number[name]: of for name, of in state.get("state", {}).items()},
        "param_groups": [{**group, "params": [number[name] for name in group["params"]]} for group in groups],
    }
