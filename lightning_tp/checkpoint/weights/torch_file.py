"""Read and write files of `torch.save` with at most one tensor in memory.

Read: `torch.load(mmap=True)` leaves tensors in the file. Write: `torch.save` itself, which asks for the bytes of each tensor when it comes to
write it (`_compat.LateTensor`). What torch has for checkpoints that are already on disk, `distributed.checkpoint.format_utils`, loads all of
one before it writes.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tp._compat import LateTensor
from lightning_tp.checkpoint.storage.nested import map_nested
from lightning_tp.checkpoint.storage.path import StoragePath
from lightning_tp.checkpoint.storage.streams import CountedStream
from lightning_tp.checkpoint.storage.unpickle import load
from lightning_tp.checkpoint.weights.stored import StoredCheckpoint, StoredTensor, in_memory
from lightning_tp.errors import TPError


def write_torch(tree: Any, raw: Any) -> None:
    """Write a nesting in which tensors may be stored ones as `torch.save` writes it: they are read and written one after the other.

    Raises:
        TPError: if something in it does not pickle, or can't be read.
        OSError: if the file can't be written.
    """
    tied: dict[Any, LateTensor] = {}

    def late(node: Any, _: Any) -> Any:
        if not isinstance(node, StoredTensor):
            return node
        made = LateTensor(node.shape, node.dtype, node.read)
        return made if node.key is None else tied.setdefault((node.key, node.dtype), made)

    stream: Any = CountedStream(raw)
    try:
        torch.save(map_nested(late, tree, copy=False), stream)
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise TPError(f"The checkpoint contains something that can't be pickled: {error}") from error
    except (OSError, RuntimeError) as error:
        raise (stream.failed or error) from None


def load_file(path: Path, *, weights_only: bool = True) -> Any:
    """Load what `torch.save` wrote, with a stored tensor in place of each tensor; these stay on disk.

    `TPError` as `unpickle.load`, or for a tensor in it of a kind that has no plain numbers.
    """

    def stored(node: Any, _: Any) -> Any:
        if not isinstance(node, Tensor):
            return node
        if type(node) not in (Tensor, torch.nn.Parameter) or node.layout != torch.strided or node.is_meta or node.is_quantized:
            kind = "quantized" if node.is_quantized else "meta" if node.is_meta else str(node.layout).removeprefix("torch.")
            raise TPError(f"`{path}` contains a {type(node).__name__} ({kind}), which can't be read here: only plain tensors can.")
        return in_memory(node)

    return map_nested(stored, load(StoragePath(path), weights_only=weights_only, mmap=True))


def open_file(path: Path, *, weights_only: bool = True) -> StoredCheckpoint:
    """Open a Lightning checkpoint in one file, or a state dict (see `open_checkpoint`); `TPError` if it is neither, or as `load_file`."""
    tree = load_file(path, weights_only=weights_only)
    if not isinstance(tree, dict):
        kind = "Tensor" if isinstance(tree, StoredTensor) else type(tree).__name__
        raise TPError(f"`{path}` contains a {kind}; a checkpoint is a dict of tensors, or one with a `state_dict`.")
    key = next((k for k in ("state_dict", "model", "module") if isinstance(tree.get(k), dict)), None)
    if key is None:
        model = {k: v for k, v in tree.items() if isinstance(v, StoredTensor)}
        if not model:
            raise TPError(f"`{path}` contains no tensors, but: {', '.join(map(str, list(tree)[:6]))}.")
        return StoredCheckpoint("file", path, model, [], {k: v for k, v in tree.items() if k not in model}, "torch.save")
    model = {k: v for k, v in tree[key].items() if isinstance(v, StoredTensor)}
    optimizers = list(tree.get("optimizer_states") or [])
    rest = {k: v for k, v in tree.items() if k not in (key, "optimizer_states")}
    by = "a Lightning Trainer" if "pytorch-lightning_version" in tree else "torch.save"
    return StoredCheckpoint("file", path, model, optimizers, rest, by)
