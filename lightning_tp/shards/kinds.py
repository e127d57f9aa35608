"""Let torch's optimizers and clipping take tensors of several kinds together: plain ones, and DTensors of one mesh or another.

`backend="dtensor"` leaves plain what it does not split. Functions that take a list of tensors, which optimizers and clipping use by default on
GPUs, refuse lists of several kinds. Both group what they are given by device and dtype first; here they group it by kind as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_tp._compat import full_tensor, wrap_grouping

Lists = list[list[Tensor | None]]
Groups = dict[Any, tuple[Lists, list[int]]]  # by (device, dtype)


class _Key(tuple[Any, ...]):
    """A (device, dtype) that may be in a dict twice."""

    __hash__, __eq__ = object.__hash__, object.__eq__


def kind_of(tensor: Tensor | None) -> Any:
    """Return the mesh of a DTensor, and None for a plain tensor."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def take_kinds_apart() -> None:
    """Make optimizers and clipping of torch group tensors by kind, in this process, from now on."""
    wrap_grouping(_by_kind)


def _by_kind(own: Callable[..., Groups]) -> Callable[..., Groups]:
    def group_tensors(lists: Lists, with_indices: bool = False) -> Groups:
        kinds = [kind_of(t) for t in lists[0]]
        different = list(dict.fromkeys(kinds))
        if len(different) < 2:
            return own(lists, with_indices)
        found: Groups = {}
        for kind in different:
            places = [i for i, k in enumerate(kinds) if k == kind]
            groups = own([[x[i] for i in places] if x else [] for x in lists], with_indices)
            for key, (parts, indices) in groups.items():
                found[_Key(key)] = parts, [places[i] for i in indices]
        return found

    return group_tensors


def norm_by_kind(
    own: Callable[..., Tensor], tensors: Sequence[Tensor], norm_type: float, error: bool, foreach: bool | None
) -> Tensor:
    """Return the norm of all tensors together by torch's `get_total_norm`, which is called for each kind."""
    kinds = list(dict.fromkeys(map(kind_of, tensors)))
    if len(kinds) < 2:
        return own(tensors, norm_type, error, foreach)
    norms = [own([t for t in tensors if kind_of(t) == kind], norm_type, error, foreach) for kind in kinds]
    norms = [full_tensor(norm) if isinstance(norm, DTensor) else norm for norm in norms]
    dtype = max((norm.dtype for norm in norms), key=lambda d: d.itemsize)
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device, dtype) for norm in norms]), norm_type)
