"""Results on the meta device, made without torch's own kernels for it.

Many of those kernels are written in Python (`torch._refs`) and take up to 2 ms a call, most of it for cases that a transformer's forward
does not have: strides of all kinds, promotion of dtypes, sizes that are symbols. In the plain case, contiguous tensors of one dtype, what
comes out is known from the shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

aten = torch.ops.aten
Made = tuple[Tensor, ...] | Tensor | None
PLAIN = (Tensor, nn.Parameter)


def made(func: Any, args: Any, kwargs: Any) -> Made:
    """What `func(*args, **kwargs)` gives for tensors on the meta device: new tensors with the same shapes, dtypes and strides.

    Returns:
        None where this is not a plain case: call it.
    """
    make = _MAKERS.get(func)
    return None if make is None or not _SHAPELESS.issuperset(kwargs) else make(*args)


def _plain(*tensors: Any) -> bool:
    """Contiguous floating-point tensors on the meta device, of one dtype."""
    dtype = tensors[0].dtype if isinstance(tensors[0], Tensor) else None
    return all(
        type(t) in PLAIN and t.is_meta and t.dtype is dtype and dtype.is_floating_point and t.is_contiguous() for t in tensors
    )


def _same(x: Any, *rest: Any) -> Made:
    """Of the shape of the first; the rest is no tensor."""
    return torch.empty_like(x) if _plain(x) and not any(isinstance(r, (Tensor, complex)) for r in rest) else None


def _softmax(x: Any, dim: int, *rest: Any) -> Made:
    return _same(x) if not rest or rest[0] in (None, False) else None


def _triangle(x: Any, *rest: Any) -> Made:
    return torch.empty_like(x) if type(x) in PLAIN and x.is_meta and x.ndim > 1 and x.is_contiguous() else None


def _pair(x: Any, y: Any) -> Made:
    """Of the shape of the one of which the other's is a tail, or has ones where it differs."""
    if isinstance(y, (int, float)):
        return _same(x)
    if not _plain(x, y):
        return None
    for wide, other in ((x, y), (y, x)):
        start = wide.ndim - other.ndim
        if start >= 0 and all(n in (1, wide.shape[start + d]) for d, n in enumerate(other.shape)):
            return torch.empty_like(wide)
    return None


def _addmm(bias: Any, x: Any, weight: Any) -> Made:
    if not _plain(bias, x) or type(weight) not in PLAIN or not weight.is_meta or weight.dtype is not x.dtype:
        return None  # the weight is read as it lies, most often transposed
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[0] or bias.shape != weight.shape[1:]:
        return None
    return x.new_empty(x.shape[0], weight.shape[1])


def _layer_norm(x: Any, shape: list[int], weight: Any, bias: Any, eps: float) -> Made:
    given = [t for t in (weight, bias) if t is not None]
    if not _plain(x, *given) or not shape or any(list(t.shape) != list(shape) for t in (*given, x[(0,) * (x.ndim - len(shape))])):
        return None
    statistics = (*x.shape[: x.ndim - len(shape)], *([1] * len(shape)))
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    return torch.empty_like(x), x.new_empty(statistics, dtype=dtype), x.new_empty(statistics, dtype=dtype)


_SHAPELESS = frozenset({"alpha", "beta", "approximate"})
_MAKERS: dict[Any, Callable[..., Made]] = {
    aten.addmm.default: _addmm,
    aten.native_layer_norm.default: _layer_norm,
    aten.tril.default: _triangle,
    aten._softmax.default: _softmax,
    aten._log_softmax.default: _softmax,
    aten._safe_softmax.default: _softmax,
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor), _pair),
    **dict.fromkeys((aten.mul.Scalar, aten.pow.Tensor_Scalar), _same),
    **dict.fromkeys(
        (aten.gelu.default, aten.silu.default, aten.relu.default, aten.tanh.default, aten.rsqrt.default, aten.neg.default), _same
    ),
}
