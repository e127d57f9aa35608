"""Match the tensors of a checkpoint with those of a model, by names and shapes; nothing is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_tp.checkpoint.weights.stored import StoredTensor
from lightning_tp.shards.state_dict import persistent

Shape = tuple[int, ...]


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model by name, tied ones under each of their names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def persistent_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers that are in the model's state dict, in its order."""
    tensors = model_tensors(model)
    return {name: tensors[name] for name in persistent(model) if name in tensors}


def full_shape(t: Tensor) -> Shape:
    """Return the shape of a parameter before it was sharded."""
    shard = getattr(t, "_tp_shard", None)
    return tuple(shard.shape if shard is not None else t.shape)


@dataclass(frozen=True)
class Match:
    """What of a checkpoint fits a model."""

    found: dict[str, StoredTensor]  # the tensors that fit, by the model's names
    missing: list[str]  # names of the model that the checkpoint lacks, also under the other names of tied tensors
    unexpected: list[str]  # names of the checkpoint that the model lacks
    misshapen: dict[str, tuple[Shape, Shape]]  # name -> (shape in the checkpoint, shape in the model)

    def problems(self, *, strict: bool = True, prefix: str = "") -> list[str]:
        """Say what does not fit; without `strict` shapes only. `prefix` goes in front of the names that one side lacks."""
        lines = [
            f"`{n}` has shape {stored} in the checkpoint, but {wanted} in the model"
            for n, (stored, wanted) in self.misshapen.items()
        ]
        if strict:
            lines += [f"`{prefix}{n}` is missing from the checkpoint" for n in self.missing]
            lines += [f"`{prefix}{n}` is not in the model" for n in self.unexpected]
        return lines


def match_tensors(wanted: Mapping[str, Tensor], stored: Mapping[str, StoredTensor]) -> Match:
    """Match stored tensors, under a model's names (see `rename_prefix`), with the model's, by their shapes and identities (ties)."""
    has_source = {id(t) for name, t in wanted.items() if name in stored}
    shapes = {name: (stored[name].shape, full_shape(t)) for name, t in wanted.items() if name in stored}
    found = {name: stored[name] for name, (shape, full) in shapes.items() if shape == full}
    misshapen = {name: both for name, both in shapes.items() if name not in found}
    missing = [name for name, t in wanted.items() if id(t) not in has_source]
    return Match(found, missing, [name for name in stored if name not in wanted], misshapen)


def find_prefixes(stored: Iterable[str], wanted: Iterable[str]) -> tuple[str, str]:
    """Return the prefix to strip from the names in a checkpoint, and the one to add, so that most of them are names of a model.

    Example:
        >>> find_prefixes(["layers.0.weight", "layers.1.weight"], ["model.layers.0.weight", "model.layers.1.weight", "head.weight"])
        ('', 'model.')
    """
    stored, wanted = list(stored), list(wanted)
    candidates: Counter[tuple[str, str]] = Counter()
    for name in stored[:: max(1, len(stored) // 16)]:
        parts = name.split(".")
        for i in range(len(parts)):
            end = ".".join(parts[i:])
            if i and len(parts) - i < 2:
                break
            strip = name[: len(name) - len(end)]
            candidates.update(
                (strip, other[: len(other) - len(end)]) for other in wanted if other == end or other.endswith(f".{end}")
            )
    known = set(wanted)
    fits = {
        (strip, add): sum(name.startswith(strip) and add + name[len(strip) :] in known for name in stored)
        for strip, add in candidates
    }
    return max(fits, key=lambda pair: (fits[pair], -len(pair[0]) - len(pair[1])), default=("", ""))


def rename_prefix(stored: Mapping[str, Any], strip: str, add: str) -> tuple[dict[str, Any], list[str]]:
    """Return what has the prefix `strip`, with `add` in its place, and the names of what has not."""
    renamed = {add + name[len(strip) :]: value for name, value in stored.items() if name.startswith(strip)}
    return renamed, [name for name in stored if not name.startswith(strip)]


def listing(items: list[str], most: int, separator: str = "; ") -> str:
    """Join the first `most` items for a message, and say how many more there are."""
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return separator.join([*items[:most], *more])
