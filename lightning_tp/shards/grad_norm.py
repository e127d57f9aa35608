"""The norm of gradients as one process would have it, and clipping by it: each element counts once; one all-reduce per axis.

torch's counterparts are `torch.nn.utils.get_total_norm` and `clip_grad_norm_`, which do the same on a split model, through this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_tp._compat import foreach_mul_, foreach_norm, full_tensor, local_tensor, wrap_total_norm
from lightning_tp.core.comm.collectives import reduce_over
from lightning_tp.errors import TPError
from lightning_tp.shards.gradients import PartialGradients
from lightning_tp.shards.kinds import norm_by_kind, take_kinds_apart
from lightning_tp.shards.shard import ParamShard
from lightning_tp.shards.view import local_view

_applied: WeakSet[PartialGradients] = WeakSet()  # of the models that live; weak references to parameters would pin them


def register(gradients: PartialGradients) -> None:
    """Make `torch.nn.utils.clip_grad_norm_`, however it was imported, take the norm of the full gradients of these parameters."""
    _applied.add(gradients)
    wrap_total_norm(_norm_of_applied)


def register_kinds() -> None:
    """Make optimizers and clipping of torch take plain parameters together with DTensors."""
    take_kinds_apart()
    wrap_total_norm(_norm_of_applied)


def _norm_of_applied(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def get_total_norm(
        tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
    ) -> Tensor:
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        with local_view():
            of = {id(p.grad): p._tp_shard for gradients in _applied for p in gradients.parameters}  # type: ignore[attr-defined]
        known = [(of[id(t)], t) for t in tensors if id(t) in of]
        if not known:
            return norm_by_kind(own, tensors, norm_type, error_if_nonfinite, foreach)
        if len(known) != len(tensors):
            raise TPError(
                f"The norm is asked of {len(tensors)} gradients together, of which {len(known)} belong to a split model: clip the "
                "others by themselves."
            )
        return _full_norm(known, norm_type, error_if_nonfinite)

    return get_total_norm


@local_view()
@torch.no_grad()
def grad_norm(parameters: Iterable[torch.nn.Parameter], norm_type: float = 2.0, *, error_if_nonfinite: bool = False) -> Tensor:
    """Return the norm of the full gradients, as one process would have it.

    Args:
        parameters: of a model that `parallelize` was applied to.
        norm_type: p of the p-norm; `inf` for the largest element.
        error_if_nonfinite: raise if the norm is not finite.

    Returns:
        A scalar, equal on all ranks.

    Raises:
        RuntimeError: if `error_if_nonfinite` and the norm is not finite.
    """
    known = [(p._tp_shard, p.grad) for p in parameters if p.grad is not None]  # type: ignore[attr-defined]
    return _full_norm(known, norm_type, error_if_nonfinite)


@local_view()
@torch.no_grad()
def grad_norms(module: torch.nn.Module, norm_type: float | str = 2.0, group_separator: str = "/") -> dict[str, Tensor]:
    """Return the norm of each parameter's full gradient, and of all together, named as by `lightning.pytorch.utilities.grad_norm`.

    That function does the same on a split model, through this. A collective: every rank has to call it.

    Args:
        module: that `parallelize` was applied to, or a part of it.
        norm_type: p of the p-norm; `inf` for the largest element.
        group_separator: stands between "grad_2.0_norm" and the parameter's name.

    Example:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> {name: f"{norm:.3f}" for name, norm in grad_norms(layer).items()}
        {'grad_2.0_norm/weight': '1.414', 'grad_2.0_norm_total': '1.414'}
    """
    order = float(norm_type)
    if order <= 0:
        raise TPError(f"`norm_type={norm_type!r}`: give a number above 0, or 'inf'.")
    named = [(n, p, p.grad) for n, p in module.named_parameters() if p.grad is not None]
    if not named:
        return {}
    largest = order == float("inf")
    shards = [getattr(p, "_tp_shard", None) for _, p, _ in named]
    each = [_local_power(shard, grad, order) for shard, (_, _, grad) in zip(shards, named, strict=True)]
    groups = {id(group): group for shard in shards if shard is not None for group in shard.groups}
    total = reduce_over(torch.stack([t.to(each[0].dtype) for t in each]), groups.values(), largest=largest)
    all_together = total.max() if largest else total.sum().pow(1 / order)
    total = total if largest else total.pow(1 / order)
    found = {f"grad_{order}_norm{group_separator}{name}": norm for (name, _, _), norm in zip(named, total, strict=True)}
    return {**found, f"grad_{order}_norm_total": all_together}


def _local_power(shard: ParamShard | None, grad: Tensor, order: float) -> Tensor:
    """This rank's term of the sum of |g| ** order over a full gradient; of the maximum, for an infinite order."""
    if shard is None and isinstance(grad, DTensor):  # of `backend="dtensor"`: nothing is left to sum
        norm = full_tensor(torch.linalg.vector_norm(grad, order))
        return norm if order == float("inf") else norm.pow(order)
    grad = local_tensor(grad)
    parts = [(grad, 1)] if shard is None else shard.parts_by_copies(grad)
    norms = [(_norms([part], order)[0], copies) for part, copies in parts if part.numel()]
    zero = torch.zeros((), device=grad.device, dtype=torch.float64 if grad.dtype == torch.float64 else torch.float32)
    if order == float("inf"):
        return max((norm for norm, _ in norms), default=zero)
    return sum((norm.pow(order) / copies for norm, copies in norms), zero)


@local_view()
@torch.no_grad()
def _full_norm(gradients: list[tuple[ParamShard, Tensor]], norm_type: float, error_if_nonfinite: bool) -> Tensor:
    if not gradients:
        return torch.zeros(())
    parts: list[Tensor] = []
    weights: list[float] = []  # an element that n ranks hold counts 1/n on each
    for shard, grad in gradients:
        if shard.shared_rows is None:
            parts.append(local_tensor(grad))
            weights.append(1 / shard.copies)
        else:
            for part, copies in shard.parts_by_copies(local_tensor(grad)):
                parts.append(part)
                weights.append(1 / copies)
    if norm_type == float("inf"):
        some = [part for part in parts if part.numel()] or [parts[0].new_zeros(1)]  # a rank may hold nothing
        norm = reduce_over(_norms(some, norm_type).max(), gradients[0][0].groups, largest=True)
    else:
        norms = _norms(parts, norm_type)
        total = torch.dot(norms.pow(norm_type), _vector(tuple(weights), norms.device, norms.dtype))
        norm = reduce_over(total, gradients[0][0].groups).pow(1.0 / norm_type)
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(f"The gradient norm of order {norm_type} is {float(norm)}: it can't be clipped.")
    return norm


def _norms(parts: list[Tensor], norm_type: float) -> Tensor:
    """The norm of each part, as one float32 vector (float64 for float64)."""
    if len({t.dtype for t in parts}) == 1:
        half = parts[0].dtype in (torch.float16, torch.bfloat16)
        return torch.stack(foreach_norm(parts, norm_type, dtype=torch.float32 if half else None))
    return torch.stack([torch.linalg.vector_norm(t, norm_type, dtype=torch.float32) for t in parts])


@lru_cache(maxsize=8)
def _vector(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """These numbers on the device, cached: a model asks for the same ones at every step."""
    return torch.tensor(values, device=device, dtype=dtype)


@local_view()
@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.nn.Parameter | Iterable[torch.nn.Parameter], max_norm: float, norm_type: float = 2.0
) -> Tensor:
    """Scale all gradients in place so that their norm is at most `max_norm`; return the norm before. See `grad_norm`."""
    parameters = [parameters] if isinstance(parameters, torch.nn.Parameter) else parameters
    parameters = [p for p in parameters if p.grad is not None]
    norm = grad_norm(parameters, norm_type)
    if not parameters:
        return norm
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    foreach_mul_([local_tensor(p.grad) for p in parameters], scale)  # type: ignore[arg-type]
    return norm
