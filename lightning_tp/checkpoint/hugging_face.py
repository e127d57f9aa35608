"""The names that a Hugging Face model has in files, where these differ from those in memory.

Newer versions of transformers hold the experts of a layer in one tensor, and write them one by one under their old names. Which part of which
tensor is what in a file is found by letting transformers take the model apart on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_tp.border import persistent
from lightning_tp.checkpoint.read import Box, Stored, narrow


class Part(NamedTuple):
    """What a name in a file is: a box of a tensor in memory, in another shape."""

    of: str
    box: Box
    shape: tuple[int, ...]


class _Views(TorchFunctionMode):
    """Copies are none: what was made of a tensor by cutting it stays a view of it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.contiguous, Tensor.clone, torch.clone):
            return args[0]
        return func(*args, **(kwargs or {}))


def names_in_files(model: nn.Module) -> dict[str, Part]:
    """For each name that `save_pretrained` writes for this model what it is; {} if they are the model's own, or nobody knows.

    Args:
        model: a model of transformers, or what holds one; on the meta device or not.
    """
    inside = next(((n, m) for n, m in model.named_modules() if hasattr(m, "save_pretrained") and hasattr(m, "config")), None)
    if inside is None:
        return {}
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before version 5
        return {}
    start, within = (f"{inside[0]}." if inside[0] else ""), inside[1]
    whole = {n: torch.empty(_shape(t), device="meta") for n, t in _tensors(within).items()}
    own = {t.untyped_storage()._cdata: n for n, t in whole.items()}
    try:
        with _Views():
            apart: Mapping[str, Any] = revert_weight_conversion(within, dict(whole))
    except Exception:  # of a version that does it in another way: then the names are taken as they are
        return {}
    parts: dict[str, Part] = {}
    for name, t in apart.items():
        of = own.get(t.untyped_storage()._cdata) if isinstance(t, Tensor) else None
        box = _box(t, whole[of]) if of is not None else None
        if of is None or box is None:
            return {}
        parts[start + name] = Part(start + of, box, tuple(t.shape))
    covered: dict[str, int] = {}
    for part in parts.values():
        covered[part.of] = covered.get(part.of, 0) + math.prod(part.shape)
    if any(covered.get(start + n) != t.numel() for n, t in whole.items()):
        return {}
    return {} if all(part.of == name for name, part in parts.items()) else parts


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    return {n: named[n] for n in persistent(model) if n in named}


def _shape(t: Tensor) -> tuple[int, ...]:
    shard = getattr(t, "_ltp", None)
    return tuple(shard.shape if shard is not None else t.shape)


def _box(view: Tensor, whole: Tensor) -> Box | None:
    """Which box of a contiguous tensor a view of it is; None if it is none (a transposed one, say)."""
    offset, left = [], view.storage_offset()
    for stride in whole.stride():
        offset.append(left // stride if stride else 0)
        left -= offset[-1] * stride
    size = [1] * whole.ndim
    dim = -1
    for n, stride in zip(view.shape, view.stride(), strict=True):
        if n == 1:
            continue
        dim = next((d for d in range(dim + 1, whole.ndim) if whole.stride(d) == stride and whole.shape[d] > 1), whole.ndim)
        if dim == whole.ndim or offset[dim] + n > whole.shape[dim]:
            return None
        size[dim] = n
    return tuple(offset), tuple(size)


def apart(tensors: Mapping[str, Stored], parts: Mapping[str, Part]) -> dict[str, Stored]:
    """Under the names of files what is there under those of memory; one tensor of memory after the other."""
    by_source: dict[str, list[str]] = {}
    for name, part in parts.items():
        by_source.setdefault(part.of, []).append(name)
    last: dict[str, Tensor] = {}  # the one that was read last: its parts follow each other
    found: dict[str, Stored] = {}
    for of, source in tensors.items():
        for name in by_source.get(of, [of]):
            whole = name not in parts or parts[name].shape == source.shape
            found[name] = source if whole else _part(of, source, parts[name], last)
    return found


def _part(of: str, source: Stored, part: Part, last: dict[str, Tensor]) -> Stored:
    def load(box: Box | None, dtype: torch.dtype) -> Tensor:
        if of not in last:
            last.clear()
            last[of] = source.read()
        t = narrow(last[of], part.box).reshape(part.shape)
        return narrow(t, box).to(dtype).contiguous()

    return Stored(part.shape, source.dtype, load)


def together(stored: Mapping[str, Stored], parts: Mapping[str, Part]) -> dict[str, Stored]:
    """Under the names of memory what is there under those of files; what is not complete stays as it is."""
    by_source: dict[str, list[tuple[str, Part]]] = {}
    for name, part in parts.items():
        by_source.setdefault(part.of, []).append((name, part))
    found = dict(stored)
    for of, pieces in by_source.items():
        if all(name in stored and stored[name].shape == part.shape for name, part in pieces):
            sources = [(part.box, found.pop(name)) for name, part in pieces]
            found[of] = sources[0][1] if len(sources) == 1 else _whole(sources)
    return found


def _whole(sources: list[tuple[Box, Stored]]) -> Stored:
    shape = tuple(max(at + n for at, n in dims) for dims in zip(*(zip(*box) for box, _ in sources)))

    def load(box: Box | None, dtype: torch.dtype) -> Tensor:
        offset, size = box or ((0,) * len(shape), shape)
        out = torch.empty(size, dtype=dtype)
        for (at, length), source in sources:
            low = [max(a, b) for a, b in zip(at, offset, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(at, length, offset, size, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            extent = tuple(b - a for a, b in zip(low, high, strict=True))
            inside = tuple(a - b for a, b in zip(low, at, strict=True))
            kept = [d for d in range(len(shape)) if length[d] > 1] if len(source.shape) < len(shape) else list(range(len(shape)))
            read = source.read((tuple(inside[d] for d in kept), tuple(extent[d] for d in kept)))
            narrow(out, (tuple(a - b for a, b in zip(low, offset, strict=True)), extent)).copy_(read.view(extent))
        return out

    return Stored(shape, sources[0][1].dtype, load)
