"""This rank's tokens of a residual stream, as code outside of the blocks sees them: a tensor of the full shape.

In a sequence-parallel plan a block hands this rank's shard of the stream to the next one. What is in between, and whoever else is given it, need not
be code that the plan has seen: it gets a `StreamShard`. Sizes are those of the full stream; pointwise functions run on shards; anything else
all-gathers, once for each tensor, and runs on the full one, differentiably. All ranks have to do it together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_tp._compat import without_torch_function_subclass
from lightning_tp.core.comm.axis import SEQUENCE_DIM, Axis
from lightning_tp.core.comm.state import SEQUENCE, State
from lightning_tp.core.comm.transitions import invariant_to_sequence, sequence_to_invariant


class StreamShard(Tensor):
    """A shard (B, ceil(S / tp), ..) that is seen as (B, S, ..).

    Attributes:
        axis: the tensor-parallel axis.
        length: S.
    """

    axis: Axis
    length: int
    _full: Tensor | None

    def full_tensor(self) -> Tensor:
        """Return the full stream on every rank, differentiably."""
        full = self.__dict__.get("_full")
        local = plain_shard(self)
        record = torch.is_grad_enabled() and local.requires_grad
        if full is None or (record and not full.requires_grad):
            axis = self.axis
            before, axis.seq_len = axis.seq_len, self.length
            try:
                full = self._full = sequence_to_invariant(local, axis)
            finally:
                axis.seq_len = before
        return full if record else full.detach()

    def as_state(self, state: State) -> Tensor:
        """Return the plain tensor: this rank's shard, or the full stream."""
        return plain_shard(self) if state == SEQUENCE else self.full_tensor()

    @classmethod
    def __torch_function__(cls, func: Any, types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        first = args[0] if args else None
        if name == "__get__":
            name = func.__self__.__name__
            if name in _SIZES:
                return func(_meta(args[0]))
            if name in _SAME:
                return _as_it_is(func, args, kwargs)
        elif name == "__set__" and func.__self__.__name__ == "requires_grad":
            return _as_it_is(func, args, kwargs)
        elif name in _SIZES and isinstance(first, StreamShard):
            return func(_meta(first), *args[1:], **kwargs)
        elif name in _SAME:
            return _as_it_is(func, args, kwargs)
        elif name in _POINTWISE and isinstance(first, StreamShard) and _alike(first, args, kwargs):
            return _pointwise(func, args, kwargs)
        elif isinstance(first, StreamShard) and name.endswith("_") and (not name.endswith("__") or name in _IN_PLACE):
            return _write(func, args, kwargs)
        return func(*_in_full(args), **_in_full(kwargs))


def stream_shard(local: Tensor, axis: Axis, length: int) -> StreamShard:
    """Mark this rank's tokens (B, ceil(length / tp), ..) as what they are, and return them."""
    x: Any = local
    x.__class__ = StreamShard
    x.axis, x.length, x._full = axis, length, None
    return x


def plain_shard(x: Tensor) -> Tensor:
    """Return this rank's tokens as a plain tensor."""
    with without_torch_function_subclass():
        return x.view_as(x)


def _pointwise(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Run a function of the elements on shards; what it moves to another device is gathered first, since nothing can be gathered there."""
    first, out = args[0], _as_it_is(func, args, kwargs)
    if func.__name__ in _CASTS and isinstance(out, Tensor) and out.device != first.device:
        return func(*_in_full(args), **_in_full(kwargs))
    if out is first:
        first._full = None
    return stream_shard(out, first.axis, first.length) if type(out) is Tensor else out


def _as_it_is(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    with without_torch_function_subclass():
        return func(*args, **kwargs)


def _meta(x: StreamShard) -> Tensor:
    with without_torch_function_subclass():
        sizes = list(x.shape)
    sizes[SEQUENCE_DIM] = x.length
    return torch.empty(sizes, dtype=_as_it_is(Tensor.dtype.__get__, (x,), {}), device="meta")  # type: ignore[attr-defined]


def _alike(first: StreamShard, args: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether all tensors of a call are shards of streams of one length and shape, or numbers."""
    shape = _as_it_is(Tensor.size, (first,), {})
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    return "out" not in kwargs and all(
        type(a) is StreamShard and a.length == first.length and _as_it_is(Tensor.size, (a,), {}) == shape for a in tensors
    )


def _write(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    x = args[0]
    full = x.full_tensor().clone()
    func(full, *_in_full(args[1:]), **_in_full(kwargs))
    with without_torch_function_subclass():
        x.copy_(invariant_to_sequence(full, x.axis))
    x._full = None
    return x


def _in_full(tree: Any) -> Any:
    return tree_map_only(StreamShard, StreamShard.full_tensor, tree)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SIZES = _names("shape ndim nbytes size dim ndimension numel nelement stride __len__")
_SAME = _names(
    """dtype device layout requires_grad is_leaf grad_fn is_cuda is_cpu is_meta is_sparse is_quantized is_nested names output_nr _version is_mkldnn
    is_floating_point is_complex is_signed is_inference is_conj is_neg element_size get_device __hash__ __dir__ requires_grad_ is_xla is_mps"""
)
_POINTWISE = _names(
    """add sub mul div neg add_ sub_ mul_ div_ __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __iadd__ __isub__ __imul__ __itruediv__
    detach clone to float double half bfloat16 type contiguous"""
)
_CASTS = _names("to type")  # which may move as well
_IN_PLACE = _names("__setitem__ __iadd__ __isub__ __imul__ __itruediv__ __ipow__")
