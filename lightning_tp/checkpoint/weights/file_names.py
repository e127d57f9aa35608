"""The names that a Hugging Face model's tensors have in files, where these differ from those in memory.

Newer versions of transformers hold the experts of a layer in one tensor, and write them one by one under their old names. Which slice of which
tensor has which name in a file is found by letting transformers take the model apart on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_tp._compat import storage_key
from lightning_tp.checkpoint.weights.matching import full_shape, persistent_tensors
from lightning_tp.checkpoint.weights.stored import StoredTensor
from lightning_tp.core.boxes import Box, assemble, box_of_view, narrow


class TensorSlice(NamedTuple):
    """What has a name of its own in a file: a box of the tensor `source` in memory; `shape` may lack the box's dims of size 1."""

    source: str
    box: Box
    shape: tuple[int, ...]


class _Views(TorchFunctionMode):
    """Copies are not made: what was cut from a tensor stays a view of it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.contiguous, Tensor.clone, torch.clone):
            return args[0]
        return func(*args, **(kwargs or {}))


def slices_in_files(model: nn.Module) -> dict[str, TensorSlice]:
    """Return what each name is that `save_pretrained` writes for a model inside; {} if these are the model's own names, or nobody knows."""
    start, inner = next(
        ((f"{n}." if n else "", m) for n, m in model.named_modules() if hasattr(m, "save_pretrained") and hasattr(m, "config")),
        ("", None),
    )
    if inner is None:
        return {}
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before version 5
        return {}
    full = {name: torch.empty(full_shape(t), device="meta") for name, t in persistent_tensors(inner).items()}
    try:
        with _Views():
            written: Mapping[str, Any] = revert_weight_conversion(inner, dict(full))
    except Exception:  # of a version that does it in another way: then the names are taken as they are
        return {}
    slices = _as_slices(full, written)
    if slices is None or all(s.source == name for name, s in slices.items()):
        return {}
    return {start + name: TensorSlice(start + s.source, s.box, s.shape) for name, s in slices.items()}


def _as_slices(full: Mapping[str, Tensor], written: Mapping[str, Any]) -> dict[str, TensorSlice] | None:
    """Say of which tensor and box each written one is a view; None if one is not, or if they don't cover all tensors."""
    names = {storage_key(t): name for name, t in full.items()}
    covered = dict.fromkeys(full, 0)
    slices: dict[str, TensorSlice] = {}
    for name, t in written.items():
        source = names.get(storage_key(t)) if isinstance(t, Tensor) else None
        box = box_of_view(t, full[source]) if source is not None else None
        if source is None or box is None:
            return None
        slices[name] = TensorSlice(source, box, tuple(t.shape))
        covered[source] += math.prod(t.shape)
    return slices if all(covered[name] == t.numel() for name, t in full.items()) else None


def split_for_files(tensors: Mapping[str, StoredTensor], slices: Mapping[str, TensorSlice]) -> dict[str, StoredTensor]:
    """Return tensors under the names of files, from those under the names of memory; the slices of a tensor follow each other."""
    of_source: dict[str, list[str]] = {}
    for name, s in slices.items():
        of_source.setdefault(s.source, []).append(name)
    last: dict[str, Tensor] = {}  # the one that was read last
    found: dict[str, StoredTensor] = {}
    for source, stored in tensors.items():
        for name in of_source.get(source, [source]):
            is_all = name not in slices or slices[name].shape == stored.shape
            found[name] = stored if is_all else _slice_of(source, stored, slices[name], last)
    return found


def _slice_of(source: str, stored: StoredTensor, s: TensorSlice, last: dict[str, Tensor]) -> StoredTensor:
    def load(box: Box, dtype: torch.dtype) -> Tensor:
        if source not in last:
            last.clear()
            last[source] = stored.read()
        return narrow(narrow(last[source], s.box).reshape(s.shape), box).to(dtype).contiguous()

    return StoredTensor(s.shape, stored.dtype, load)


def merge_from_files(stored: Mapping[str, StoredTensor], slices: Mapping[str, TensorSlice]) -> dict[str, StoredTensor]:
    """Return tensors under the names of memory, from those under the names of files; what is not complete stays as it is."""
    of_source: dict[str, list[tuple[str, TensorSlice]]] = {}
    for name, s in slices.items():
        of_source.setdefault(s.source, []).append((name, s))
    found = dict(stored)
    for source, named in of_source.items():
        if all(name in stored and stored[name].shape == s.shape for name, s in named):
            pieces = [(s.box, found.pop(name)) for name, s in named]
            found[source] = pieces[0][1] if len(pieces) == 1 else _merged(source, pieces)
    return found


def _merged(source: str, pieces: list[tuple[Box, StoredTensor]]) -> StoredTensor:
    shape = tuple(max(offset + size for offset, size in dims) for dims in zip(*(zip(*box) for box, _ in pieces)))

    def load(box: Box, dtype: torch.dtype) -> Tensor:
        readers = ((piece, partial(_read_inner, stored, piece)) for piece, stored in pieces)
        return assemble(box, readers, dtype, f"`{source}`")

    return StoredTensor(shape, pieces[0][1].dtype, load)


def _read_inner(stored: StoredTensor, piece: Box, inner: Box) -> Tensor:
    """Read a box of a piece, which may have other dims of size 1 in the file."""
    dims = iter([(offset, n) for offset, n, size in zip(*inner, piece.size, strict=True) if size > 1])
    in_file = [(0, 1) if size == 1 else next(dims) for size in stored.shape]
    return stored.read(Box(tuple(offset for offset, _ in in_file), tuple(n for _, n in in_file))).view(inner.size)
