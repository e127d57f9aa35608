"""Which torch functions draw random numbers, and how their calls are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode

# calls that change what they are handed, and those that only fill a tensor
ON_OPERAND = frozenset(
    {
        F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, F.rrelu, F.gumbel_softmax,
        F.scaled_dot_product_attention, torch.dropout, torch.dropout_, torch.native_dropout, torch.alpha_dropout, torch.feature_dropout,
        torch.rrelu, torch.multinomial, torch.poisson,
    }
)  # fmt: skip


FILLS = frozenset(
    {
        torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, Tensor.bernoulli_, Tensor.uniform_, Tensor.normal_,
        Tensor.exponential_, Tensor.random_, Tensor.geometric_, Tensor.cauchy_, Tensor.log_normal_, torch.bernoulli, Tensor.bernoulli,
        torch.rand_like, torch.randn_like, torch.randint_like,
    }
)  # fmt: skip


DRAWS = ON_OPERAND | FILLS


BY_INDEX = frozenset({Tensor.__getitem__, torch.index_select, Tensor.index_select, F.embedding, torch.embedding})


REPLACED: dict[str, Callable[..., Any]] = {"dropout": F.dropout, "scaled_dot_product_attention": F.scaled_dot_product_attention}


OF_ATTENTION = F.scaled_dot_product_attention


EXACT = frozenset({F.dropout, torch.dropout, OF_ATTENTION})


_P_AT = {OF_ATTENTION: ("dropout_p", 4, 0.0)}  # else ("p", 1, 0.5)


class without_dropout(TorchFunctionMode):
    """Dropout drops nothing while this is on: how a model splits does not depend on it, and runs can be compared.

    Example:
        >>> with without_dropout():
        ...     F.dropout(torch.ones(3), 0.5)
        tensor([1., 1., 1.])
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is OF_ATTENTION and _p(func, args, kwargs):
            return func(*args[:4], **{**dict(zip(("dropout_p", "is_causal"), args[4:])), **kwargs, "dropout_p": 0.0})
        if (
            func in ON_OPERAND
            and "dropout" in func.__name__
            and func is not torch.native_dropout
            and _is_random(func, args, kwargs)
        ):
            return _operand(args, kwargs)
        return func(*args, **kwargs)


def _is_random(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call draws at all: no dropout of nothing, or outside of training."""
    if func in FILLS:
        return True
    if func is OF_ATTENTION:
        return bool(_p(func, args, kwargs))
    if "dropout" in getattr(func, "__name__", ""):
        return bool(_p(func, args, kwargs)) and _flag(args, kwargs, "training", 2, kwargs.get("train", True))
    return func is not F.rrelu or _flag(args, kwargs, "training", 3)


def _p(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    name, at, default = _P_AT.get(func, ("p", 1, 0.5))
    return float(args[at] if len(args) > at else kwargs.get(name, default))


def _flag(args: tuple[Any, ...], kwargs: dict[str, Any], name: str, at: int, default: bool = False) -> bool:
    return bool(args[at] if len(args) > at else kwargs.get(name, default))


def _operand(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    found = args[0] if args else next((kwargs[name] for name in ("input", "query", "logits") if name in kwargs), None)
    assert isinstance(found, Tensor)
    return found


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    found = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
    if found is not None:
        return found.device
    return torch.empty(0, device=kwargs.get("device")).device
