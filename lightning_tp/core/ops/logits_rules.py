"""What functions do with split logits, by their names: one small function for each kind, one table at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from lightning_tp.core.comm.axis import Axis, even_shard
from lightning_tp.core.comm.transitions import invariant_to_replicate
from lightning_tp.core.ops.cross_entropy import cross_entropy_of_split
from lightning_tp.core.ops.split_logits import (
    DISPATCH_RULES,
    RULES,
    SplitLogits,
    _attached,
    _columns,
    _from_local,
    _names,
    _sizes,
    to_local,
)
from lightning_tp.errors import TPError


@torch.compiler.disable
def split_logits(local: Tensor, axis: Axis, vocab: int) -> SplitLogits:
    """This rank's columns (.., V_local) -> logits of the whole shape (.., V) that stay split.

    Raises:
        TPError: if `local` does not have the columns of `even_shard(vocab, axis.rank, axis.size)`.

    Example:
        >>> logits = split_logits(x @ weight_local.T, axis, 1003)  # doctest: +SKIP
        >>> logits.shape, logits.local.shape  # doctest: +SKIP
        (torch.Size([2, 16, 1003]), torch.Size([2, 16, 502]))
    """
    columns = len(even_shard(vocab, axis.rank, axis.size))
    if local.ndim == 0 or local.shape[-1] != columns:
        raise TPError(
            f"`split_logits`: local logits of shape {tuple(local.shape)}, but rank {axis.rank} of {axis.size} has "
            f"{columns} columns of a vocabulary of {vocab}. Pass the columns of "
            f"`even_shard({vocab}, {axis.rank}, {axis.size})`."
        )
    return _attached(local, axis, vocab, local.ndim - 1)


def _cross_entropy(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    return cross_entropy_of_split(*args, **kwargs)


def _pointwise(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """`logits / 2`, `torch.tanh(logits)`, `logits + bias`, `torch.where(mask, logits, -inf)`: (.., V) -> (.., V)."""
    if "out" in kwargs or kwargs.get("inplace"):
        return NotImplemented
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    like = next(a for a in tensors if isinstance(a, SplitLogits))
    if not all(_fits(a, like) for a in tensors):
        return NotImplemented
    out = func(*[_part(a, like) for a in args], **{key: _part(a, like) for key, a in kwargs.items()})
    return _from_local(out, like.vocab_dim, like) if isinstance(out, Tensor) else NotImplemented  # `torch.where(x)`


def _fits(a: Tensor, like: SplitLogits) -> bool:
    """Whether `a` meets `like` column by column."""
    if isinstance(a, SplitLogits):
        return a.vocab_dim == like.vocab_dim and a.local.ndim == like.local.ndim and a.vocab == like.vocab
    dim = like.vocab_dim - like.local.ndim
    return a.ndim <= like.local.ndim and (a.ndim < -dim or a.shape[dim] in (1, like.vocab))


def _part(a: Any, like: SplitLogits) -> Any:
    """Of a tensor this rank's columns; of one without columns, itself, with the gradients of all columns."""
    if isinstance(a, SplitLogits):
        return to_local(a)
    if not isinstance(a, Tensor):
        return a
    dim = like.vocab_dim - like.local.ndim
    if a.ndim >= -dim and a.shape[dim] == like.vocab:
        return _columns(a, dim, like.axis)
    return invariant_to_replicate(a, like.axis) if torch.is_grad_enabled() and a.requires_grad else a


def _cast(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """`logits.float()`, `logits.to(dtype)`; `other.to(logits)`, which only asks for the dtype and the device."""
    x, *others = args
    others = [_nothing_like(a) for a in others]
    kwargs = {key: _nothing_like(a) for key, a in kwargs.items()}
    if not isinstance(x, SplitLogits):
        return func(x, *others, **kwargs)
    local = to_local(x)
    out = func(local, *others, **kwargs)
    if out is local or not isinstance(out, Tensor):  # `logits.type()` is a string
        return x if out is local else out
    return _from_local(out, x.vocab_dim, x) if out.device == local.device else NotImplemented


def _nothing_like(a: Any) -> Any:
    """A tensor without a value for a function that asks for the shape, dtype and device alone."""
    return a.local.new_empty([1] * a.local.ndim).expand(_sizes(a)) if isinstance(a, SplitLogits) else a


def _new(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """`torch.zeros_like(logits)`, `logits.new_zeros(3)`: plain tensors."""
    return func(*[_nothing_like(a) for a in args], **{key: _nothing_like(a) for key, a in kwargs.items()})


def _reshape(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """`logits.view(-1, V)`, `flatten(0, 1)`, ..: where the vocabulary is one of the dims of the result too."""
    x, *others = args
    if not isinstance(x, SplitLogits) or (others and isinstance(others[0], torch.dtype)):
        return NotImplemented
    sizes = _sizes(x)
    new = _without_minus_one(_NEW_SIZES[func.__name__.split(".")[0]](sizes, *others, **kwargs), math.prod(sizes))
    before, after = math.prod(sizes[: x.vocab_dim]), math.prod(sizes[x.vocab_dim + 1 :])
    for dim, size in enumerate(new):
        if size == x.vocab and math.prod(new[:dim]) == before and math.prod(new[dim + 1 :]) == after:
            new[dim] = x.local.shape[x.vocab_dim]
            return _from_local(to_local(x).reshape(new), dim, x)
    return NotImplemented


def _given(sizes: tuple[int, ...], *new: Any, **kwargs: Any) -> list[int]:
    """`view(2, 3)`, `view((2, 3))`, `reshape(shape=(2, 3))`."""
    (first, *_) = new = new or tuple(kwargs.values())
    return list(first if isinstance(first, (tuple, list)) else new)


def _as_other(sizes: tuple[int, ...], other: Tensor) -> list[int]:
    return list(other.shape)


def _flattened(sizes: tuple[int, ...], start_dim: int = 0, end_dim: int = -1) -> list[int]:
    start, end = start_dim % len(sizes), end_dim % len(sizes) + 1
    return [*sizes[:start], math.prod(sizes[start:end]), *sizes[end:]]


def _unflattened(sizes: tuple[int, ...], dim: int, new: Sequence[int]) -> list[int]:
    dim %= len(sizes)
    return [*sizes[:dim], *_without_minus_one(list(new), sizes[dim]), *sizes[dim + 1 :]]


def _without_minus_one(sizes: list[int], numel: int) -> list[int]:
    """The size that -1 stands for; where there is none, the -1 stays for torch to complain about."""
    if sizes.count(-1) == 1:
        known = -math.prod(sizes)
        if known and numel % known == 0:
            sizes[sizes.index(-1)] = numel // known
    return sizes


def _follow(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """`logits.transpose(1, 2)`, `unsqueeze(0)`, `split(1024)`, ..: what is the vocabulary dim of the result?

    A stand-in without memory shows it: it has stride 1 along the vocabulary and 0 elsewhere.
    """
    x, *others = args
    if not isinstance(x, SplitLogits) or x.vocab == 1 or "out" in kwargs:
        return NotImplemented
    sizes = list(_sizes(x))
    if func.__name__ == "squeeze":  # only what is 1 on all ranks: one of them may have a single column
        given = (others or [kwargs.get("dim", range(len(sizes)))])[0]
        given = (given,) if isinstance(given, int) else given
        others, kwargs = [tuple(d for d in given if sizes[d] == 1)], {}
    sizes[x.vocab_dim] += 1  # a function that asks for V columns does not suit a rank that has fewer
    strides = [int(dim == x.vocab_dim) for dim in range(len(sizes))]
    probe = torch.empty(x.vocab + 1, dtype=torch.int8, device="cpu").as_strided(sizes, strides)
    try:
        probe = func(probe, *others, **kwargs)
    except (RuntimeError, IndexError, TypeError, ValueError):
        return NotImplemented  # torch says it better of the whole
    first = probe if isinstance(probe, Tensor) else probe[0]
    dims = [d for d in range(first.ndim) if first.stride(d) == 1 and first.shape[d] == x.vocab + 1]
    if len(dims) != 1:
        return NotImplemented
    out = func(to_local(x), *others, **kwargs)
    if isinstance(out, Tensor):
        return _from_local(out, dims[0], x)
    return tuple(_from_local(item, dims[0], x) for item in out)


def _index(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """`logits[:, :-1]`, `logits[..., -1, :]`, `logits[mask]`, `logits[rows, last]`: where all of the words are taken."""
    x, index = args
    entries = [_index_entry(e) for e in (index if isinstance(index, tuple) else (index,))]
    if not isinstance(x, SplitLogits) or any(e is NotImplemented for e in entries):
        return NotImplemented
    dots = [i for i, e in enumerate(entries) if e is Ellipsis] or [len(entries)]
    missing = x.local.ndim - sum(_dims_taken(e) for e in entries)
    if missing < 0 or len(dots) > 1:
        return NotImplemented
    entries[dots[0] : dots[0] + 1] = [slice(None)] * missing

    tensors = [i for i, e in enumerate(entries) if isinstance(e, Tensor)]
    new_dims = 0  # of all tensors together, where they stand
    if tensors:
        masks = any(entries[i].dtype == torch.bool for i in tensors)
        if tensors[-1] - tensors[0] >= len(tensors) or (masks and len(tensors) > 1):
            return NotImplemented  # the dims of tensors that stand apart go to the front
        new_dims = 1 if masks else len(torch.broadcast_shapes(*[entries[i].shape for i in tensors]))
    dim_in = dim_out = 0
    for i, e in enumerate(entries):
        taken = _dims_taken(e)
        if dim_in <= x.vocab_dim < dim_in + taken:
            break
        dim_in += taken
        if e is None or isinstance(e, slice):
            dim_out += 1
        elif tensors and i == tensors[0]:
            dim_out += new_dims
    if not (isinstance(e, slice) and e.indices(x.vocab) == (0, x.vocab, 1)):
        return NotImplemented
    entries[i] = slice(None)
    return _from_local(to_local(x)[tuple(entries)], dim_out, x)


def _index_entry(entry: Any) -> Any:
    """The entry of an index, a list as a tensor; NotImplemented for what is not followed here."""
    if isinstance(entry, list) and entry and all(type(item) in (int, bool) for item in entry):
        entry = torch.tensor(entry)
    if isinstance(entry, Tensor):
        known = entry.dtype in (torch.bool, torch.int32, torch.int64) and not isinstance(entry, SplitLogits)
    elif isinstance(entry, slice):
        known = all(type(part) in (int, NoneType) for part in (entry.start, entry.stop, entry.step))
    else:
        known = entry is None or entry is Ellipsis or type(entry) is int
    return entry if known else NotImplemented


def _dims_taken(entry: Any) -> int:
    """Of the tensor that is indexed: how many dims this entry of the index is about."""
    if entry is None or entry is Ellipsis:
        return 0
    return entry.ndim if isinstance(entry, Tensor) and entry.dtype == torch.bool else 1


_NEW_SIZES: dict[str, Callable[..., list[int]]] = {
    **dict.fromkeys(_names("view reshape _unsafe_view"), _given),
    **dict.fromkeys(_names("view_as reshape_as"), _as_other),
    "flatten": _flattened,
    "unflatten": _unflattened,
}


RULES.update(
    {
        "cross_entropy": _cross_entropy,
        "__getitem__": _index,
        **dict.fromkeys(
            _names(
                """add sub mul div true_divide multiply divide subtract rsub __rsub__ __rdiv__ pow neg negative abs absolute
            square sqrt rsqrt exp expm1 log log1p tanh sigmoid relu gelu silu softplus clamp clip clamp_min clamp_max
            minimum maximum nan_to_num masked_fill where clone"""
            ),
            _pointwise,
        ),
        **dict.fromkeys(_names("to type type_as float double half bfloat16 contiguous"), _cast),
        **dict.fromkeys(
            _names(
                """zeros_like ones_like full_like empty_like rand_like randn_like
            new_zeros new_ones new_full new_empty new_tensor"""
            ),
            _new,
        ),
        **dict.fromkeys(_NEW_SIZES, _reshape),
        **dict.fromkeys(
            _names(
                """transpose swapaxes swapdims permute movedim moveaxis t T mT unsqueeze squeeze
            select narrow unbind split chunk"""
            ),
            _follow,
        ),
    }
)


DISPATCH_RULES.update(
    {
        **dict.fromkeys(_names("detach alias clone add sub mul div neg"), _pointwise),
        **dict.fromkeys(_names("zeros_like ones_like full_like empty_like new_zeros new_empty"), _new),
        "_to_copy": _cast,
        "view": _reshape,
        "_unsafe_view": _reshape,
    }
)
