"""Make vocab-parallel logits, and say what functions do with them: a small rule for each kind of function, and a table at the end.

A rule is called with the function and its arguments, and gives the result, or `NotImplemented` where the logits have to be all-gathered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
    full_sizes,
    local_columns,
    to_local,
    torchs_own,
    wrap_columns,
    wrap_columns_like,
)
from lightning_tp.errors import TPError


@torch.compiler.disable
def split_logits(local: Tensor, axis: Axis, vocab: int) -> SplitLogits:
    """Make logits of the full shape (.., V) of this rank's columns (.., V_local), which stay sharded.

    Raises:
        TPError: if `local` does not have the columns of `even_shard(vocab, axis.rank, axis.size)`.
    """
    columns = len(even_shard(vocab, axis.rank, axis.size))
    if local.ndim == 0 or local.shape[-1] != columns:
        raise TPError(
            f"`split_logits`: local logits of shape {tuple(local.shape)}, but rank {axis.rank} of {axis.size} has "
            f"{columns} columns of a vocabulary of {vocab}. Pass the columns of "
            f"`even_shard({vocab}, {axis.rank}, {axis.size})`."
        )
    return wrap_columns(local, axis, vocab, local.ndim - 1)


def _cross_entropy(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    return cross_entropy_of_split(*args, **kwargs)


def _pointwise(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """`logits / 2`, `torch.tanh(logits)`, `logits + bias`, `torch.where(mask, logits, -inf)`: (.., V) -> (.., V)."""
    if "out" in kwargs or kwargs.get("inplace"):
        return NotImplemented
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    logits = next(a for a in tensors if isinstance(a, SplitLogits))
    if not all(_is_aligned(a, logits) for a in tensors):
        return NotImplemented
    out = func(*[_local_operand(a, logits) for a in args], **{key: _local_operand(a, logits) for key, a in kwargs.items()})
    return wrap_columns_like(out, logits.vocab_dim, logits) if isinstance(out, Tensor) else NotImplemented  # `torch.where(x)`


def _is_aligned(a: Tensor, logits: SplitLogits) -> bool:
    """Whether a tensor is broadcast against the logits column by column."""
    if isinstance(a, SplitLogits):
        return a.vocab_dim == logits.vocab_dim and a.local.ndim == logits.local.ndim and a.vocab == logits.vocab
    dim = logits.vocab_dim - logits.local.ndim
    return a.ndim <= logits.local.ndim and (a.ndim < -dim or a.shape[dim] in (1, logits.vocab))


def _local_operand(a: Any, logits: SplitLogits) -> Any:
    """This rank's columns of a tensor; one without columns as it is, with the gradients of all columns."""
    if isinstance(a, SplitLogits):
        return to_local(a)
    if not isinstance(a, Tensor):
        return a
    dim = logits.vocab_dim - logits.local.ndim
    if a.ndim >= -dim and a.shape[dim] == logits.vocab:
        return local_columns(a, dim, logits.axis)
    return invariant_to_replicate(a, logits.axis) if torch.is_grad_enabled() and a.requires_grad else a


def _cast(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """`logits.float()`, `logits.to(dtype)`; `other.to(logits)`, which only asks for the dtype and the device."""
    x, *others = args
    others = [_without_values(a) for a in others]
    kwargs = {key: _without_values(a) for key, a in kwargs.items()}
    if not isinstance(x, SplitLogits):
        return func(x, *others, **kwargs)
    local = to_local(x)
    out = func(local, *others, **kwargs)
    if out is local or not isinstance(out, Tensor):  # `logits.type()` is a string
        return x if out is local else out
    return wrap_columns_like(out, x.vocab_dim, x) if out.device == local.device else NotImplemented


def _like(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """`torch.zeros_like(logits)`, `logits.new_zeros(3)`: plain tensors."""
    return func(*[_without_values(a) for a in args], **{key: _without_values(a) for key, a in kwargs.items()})


def _without_values(a: Any) -> Any:
    """For a function that asks only for the shape, dtype and device of logits: a tensor of these, of one element in memory."""
    return a.local.new_empty([1] * a.local.ndim).expand(full_sizes(a)) if isinstance(a, SplitLogits) else a


def _reshape(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """`logits.view(-1, V)`, `flatten(0, 1)`, ..: where the vocabulary is one of the dims of the result too."""
    x, *others = args
    if not isinstance(x, SplitLogits) or any(isinstance(a, torch.dtype) for a in (*others, *kwargs.values())):
        return NotImplemented
    sizes = full_sizes(x)
    try:
        new = list(_like(func, (torch.empty(sizes, device="meta"), *others), kwargs).shape)
    except (RuntimeError, IndexError, TypeError, ValueError):
        return NotImplemented  # torch says it better of the full tensor
    after = math.prod(sizes[x.vocab_dim + 1 :])
    for dim, size in enumerate(new):
        if size == x.vocab and math.prod(new[dim + 1 :]) == after:  # as many elements before it too, as in all
            new[dim] = x.local.shape[x.vocab_dim]
            return wrap_columns_like(to_local(x).reshape(new), dim, x)
    return NotImplemented


def _move_dims(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """`logits.transpose(1, 2)`, `unsqueeze(0)`, `split(1024)`, ..: which dim of the result is the vocabulary?

    The function is tried on a tensor that tells: of hardly any memory, with stride 1 along the vocabulary and 0 elsewhere.
    """
    x, *others = args
    if not isinstance(x, SplitLogits) or x.vocab == 1 or "out" in kwargs:
        return NotImplemented
    sizes = list(full_sizes(x))
    if func.__name__ == "squeeze":  # only what is 1 on all ranks: one of them may have a single column
        given = (others or [kwargs.get("dim", range(len(sizes)))])[0]
        given = (given,) if isinstance(given, int) else given
        others, kwargs = [tuple(d for d in given if sizes[d] == 1)], {}
    dim = _vocab_dim_of_result(func, sizes, x.vocab_dim, others, kwargs)
    if dim is None:
        return NotImplemented
    out = func(to_local(x), *others, **kwargs)
    return wrap_columns_like(out, dim, x) if isinstance(out, Tensor) else tuple(wrap_columns_like(item, dim, x) for item in out)


def _vocab_dim_of_result(
    func: Callable[..., Any], sizes: list[int], dim: int, args: list[Any], kwargs: dict[str, Any]
) -> int | None:
    vocab = sizes[dim] + 1  # a function that asks for V columns does not suit a rank that has fewer
    strides = [int(d == dim) for d in range(len(sizes))]
    probe = torch.empty(vocab, dtype=torch.int8, device="cpu").as_strided([*sizes[:dim], vocab, *sizes[dim + 1 :]], strides)
    try:
        out = func(probe, *args, **kwargs)
    except (RuntimeError, IndexError, TypeError, ValueError):
        return None  # torch says it better of the full tensor
    first = out if isinstance(out, Tensor) else out[0]
    dims = [d for d in range(first.ndim) if first.stride(d) == 1 and first.shape[d] == vocab]
    return dims[0] if len(dims) == 1 else None


def _index(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """`logits[:, :-1]`, `logits[..., -1, :]`, `logits[mask]`, `logits[rows, last]`: where all of the vocabulary is taken."""
    x, index = args
    entries = _entry_for_each_dim(index, x.local.ndim) if isinstance(x, SplitLogits) else None
    num_tensor_dims = None if entries is None else _num_dims_of_tensors(entries)
    if entries is None or num_tensor_dims is None:
        return NotImplemented
    dim_in = dim_out = 0  # of the logits, of the result
    first_tensor = next((i for i, e in enumerate(entries) if isinstance(e, Tensor)), None)
    for i, e in enumerate(entries):
        taken = _num_dims_taken(e)
        if dim_in <= x.vocab_dim < dim_in + taken:
            break
        dim_in += taken
        if e is None or isinstance(e, slice):
            dim_out += 1
        elif i == first_tensor:
            dim_out += num_tensor_dims
    if not (isinstance(e, slice) and e.indices(x.vocab) == (0, x.vocab, 1)):
        return NotImplemented
    entries[i] = slice(None)
    return wrap_columns_like(to_local(x)[tuple(entries)], dim_out, x)


def _entry_for_each_dim(index: Any, ndim: int) -> list[Any] | None:
    """The entries of an index with slices instead of `...`; None for an index without a rule."""
    entries = [_index_entry(e) for e in (index if isinstance(index, tuple) else (index,))]
    if any(e is NotImplemented for e in entries):
        return None
    dots = [i for i, e in enumerate(entries) if e is Ellipsis] or [len(entries)]
    missing = ndim - sum(_num_dims_taken(e) for e in entries)
    if missing < 0 or len(dots) > 1:
        return None
    entries[dots[0] : dots[0] + 1] = [slice(None)] * missing
    return entries


def _num_dims_of_tensors(entries: list[Any]) -> int | None:
    """How many dims of the result the tensors in an index make together, where the first stands; None where they make the first dims."""
    positions = [i for i, e in enumerate(entries) if isinstance(e, Tensor)]
    if not positions:
        return 0
    has_masks = any(entries[i].dtype == torch.bool for i in positions)
    if positions[-1] - positions[0] >= len(positions) or (has_masks and len(positions) > 1):
        return None
    return 1 if has_masks else len(torch.broadcast_shapes(*[entries[i].shape for i in positions]))


def _index_entry(entry: Any) -> Any:
    """An entry of an index, a list as a tensor; NotImplemented for one without a rule."""
    if isinstance(entry, list) and entry and all(type(item) in (int, bool) for item in entry):
        entry = torch.tensor(entry)
    if isinstance(entry, Tensor):
        known = entry.dtype in (torch.bool, torch.int32, torch.int64) and not isinstance(entry, SplitLogits)
    elif isinstance(entry, slice):
        known = all(type(part) in (int, NoneType) for part in (entry.start, entry.stop, entry.step))
    else:
        known = entry is None or entry is Ellipsis or type(entry) is int
    return entry if known else NotImplemented


def _num_dims_taken(entry: Any) -> int:
    """How many dims of the indexed tensor an entry of the index is about."""
    if entry is None or entry is Ellipsis:
        return 0
    return entry.ndim if isinstance(entry, Tensor) and entry.dtype == torch.bool else 1


_POINTWISE = """add sub mul div true_divide multiply divide subtract rsub __rsub__ __rdiv__ pow neg negative abs absolute square sqrt rsqrt exp
    expm1 log log1p tanh sigmoid relu gelu silu softplus clamp clip clamp_min clamp_max minimum maximum nan_to_num masked_fill where clone"""
_LIKE = "zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty new_tensor"
_MOVE_DIMS = "transpose swapaxes swapdims permute movedim moveaxis t T mT unsqueeze squeeze select narrow unbind split chunk"

_RULES: dict[str, Callable[..., Any]] = {
    "cross_entropy": _cross_entropy,
    "__getitem__": _index,
    **dict.fromkeys(_POINTWISE.split(), _pointwise),
    **dict.fromkeys(["to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous"], _cast),
    **dict.fromkeys(_LIKE.split(), _like),
    **dict.fromkeys(["view", "reshape", "view_as", "reshape_as", "flatten", "unflatten"], _reshape),
    **dict.fromkeys(_MOVE_DIMS.split(), _move_dims),
}
_DISPATCH_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(["detach", "alias", "clone", "add", "sub", "mul", "div", "neg"], _pointwise),
    **dict.fromkeys(["zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_empty"], _like),
    "_to_copy": _cast,
    "view": _reshape,
    "_unsafe_view": _reshape,
}
RULES.update({function: rule for name, rule in _RULES.items() for function in torchs_own(name)})
DISPATCH_RULES.update({getattr(torch.ops.aten, name): rule for name, rule in _DISPATCH_RULES.items()})
