"""Logits that stay split by the vocabulary, and still are a tensor of the whole shape for the code that uses them.

`SplitLogits` is what a split vocabulary head returns. For B sequences of T tokens, V words and tp ranks:

| tensor | shape on a rank | who sees it whole |
|---|---|---|
| `logits` (`SplitLogits`) | says (B, T, V), holds `.local` (B, T, V_local) | nobody |
| its gradient, where it comes from a parallel function | the same | nobody |
| `logits.full_tensor()`, and what any other function gets | (B, T, V) | all ranks, after an all-gather |

What a function does with it is decided in `__torch_function__`, by the function's name:

- `F.cross_entropy` with class indices runs in parallel (see `loss.py`);
- pointwise functions, casts, reshapes, transposes and indexing that leave the vocabulary dim whole give `SplitLogits`
  again, without communication; a plain tensor in them is cut to this rank's columns;
- shape, dtype, device, hooks and the like are answered at once, and `repr` shows shapes, not values;
- anything else gathers, once for each tensor and grad mode, and runs on the whole: right, forward and backward.

So all ranks of the axis have to run the same code on logits: `if rank == 0: logits.argmax(-1)` waits for ever. Writing
in place works where no gradient is recorded and raises `TPError` where one is. Copies (pickle, deepcopy) are whole and
plain. Autograd sees `SplitLogits` as it sees a `DTensor` made by `from_local`: it may have hooks and keep its gradient, and
the gradients that reach it are split, or whole and equal on all ranks. What bypasses `__torch_function__` (autograd's
own sums, FSDP2, custom functions) arrives in `__torch_dispatch__`, under the same rules. `torch.compile` does not look
inside: it breaks the graph here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import Function

from lightning_tp.comm import Axis, even_shard, replicate_to_gathered, replicate_to_width, width_to_replicate
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


class SplitLogits(Tensor):
    """Logits of the whole shape, of which a rank holds the columns `even_shard(vocab, axis.rank, axis.size)`.

    Made by `split_logits`. Attributes beside those of a tensor:
        local: this rank's columns, without history.
        axis: the tensor-parallel axis.
        vocab, vocab_dim: length and place of the split dim.
    """

    local: Tensor
    axis: Axis
    vocab: int
    vocab_dim: int
    _writes: list[int]  # in-place writes so far, one counter for all views of the same memory
    _gathered: Tensor | None  # the whole, and the writes that it and this tensor had seen when it was gathered
    _gathered_at: tuple[int, int]

    @staticmethod
    def __new__(cls: Any, local: Tensor, axis: Axis, vocab: int, vocab_dim: int, writes: list[int] | None = None) -> SplitLogits:
        """A tensor without history; `split_logits` makes one that autograd knows."""
        sizes = list(local.shape)
        sizes[vocab_dim] = vocab
        x = Tensor._make_wrapper_subclass(cls, sizes, dtype=local.dtype, device=local.device)
        x.local, x.axis, x.vocab, x.vocab_dim = local.detach() if local.requires_grad else local, axis, vocab, vocab_dim
        x._writes = [0] if writes is None else writes
        x._gathered = None
        return x

    def full_tensor(self) -> Tensor:
        """The whole logits on every rank, a plain tensor to read from. Differentiable; an all-gather, the first time."""
        record = torch.is_grad_enabled() and self.requires_grad
        whole = self._up_to_date()
        if whole is not None and (whole.requires_grad or not record):
            return whole if record else whole.detach()
        whole = _Gather.apply(self) if record else _gather(self)
        self._remember(whole)
        return whole

    def _up_to_date(self) -> Tensor | None:
        """The whole, if it has been gathered since the last write in place.

        Raises:
            TPError: if somebody wrote to the whole, of which a slice is handed out as the view that it seems to be.
        """
        if self._gathered is None or self._gathered_at[0] != self._writes[0]:
            return None
        if self._gathered._version != self._gathered_at[1]:
            raise TPError(
                "A slice of split logits along the vocabulary was written in place, which the logits do not see. Write "
                "to the logits themselves under `torch.no_grad()` (`logits[..., 5] = value`), or take "
                "`full = logits.full_tensor()` first and go on with that."
            )
        return self._gathered

    def _remember(self, whole: Tensor) -> None:
        self._gathered, self._gathered_at = whole, (self._writes[0], whole._version)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return (
            f"SplitLogits(shape={_sizes(self)}, dtype={self.local.dtype}, vocab_dim={self.vocab_dim}, local shape="
            f"{tuple(self.local.shape)} on rank {self.axis.rank} of {self.axis.size}; values: full_tensor())"
        )

    @classmethod
    @torch.compiler.disable
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name in ("__get__", "__set__"):
            attribute = func.__self__.__name__  # type: ignore[attr-defined]
            if name == "__get__" or attribute != "data":
                name = attribute if attribute in _COMPUTED else "attribute"
        if args and (rule := _RULES.get(name)) is not None:
            out = rule(func, args, kwargs)
            if out is not NotImplemented:
                return out
        if name in _AS_IT_IS or isinstance(func, OpOverload) or getattr(func, "__module__", None) == _C10D:
            with torch._C.DisableTorchFunctionSubclass():  # an operator or a collective comes to __torch_dispatch__
                return func(*args, **kwargs)
        if _has_split(kwargs.get("out")):
            raise _cannot_write(name)
        in_place = name in ("__setitem__", "__set__") or name == name.rstrip("_") + "_"
        if in_place and isinstance(args[0], SplitLogits):
            return _in_place(func, args, kwargs)
        return func(*_whole(args), **_whole(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        with torch.no_grad():  # autograd, if it records, has done so above
            if (rule := _DISPATCH_RULES.get(name)) is not None:
                out = rule(func, args, kwargs)
                if out is not NotImplemented:
                    return out
            for i, argument in enumerate(func._schema.arguments):
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                written = argument.is_write or (func.namespace == "c10d" and i == 0 and name.endswith("_"))
                if written and _has_split(value):
                    if i == 0 and isinstance(value, SplitLogits):
                        return _in_place(func, args, kwargs)
                    raise _cannot_write(name)
            return func(*_whole(args), **_whole(kwargs))


# ---------------------------------------------------------------------------------------------- between local and whole


class _FromLocal(Function):
    """This rank's columns -> SplitLogits. Backward: of a gradient, split or whole, this rank's columns."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, axis: Axis, vocab: int, vocab_dim: int, writes: list[int] | None) -> SplitLogits:
        ctx.axis, ctx.vocab_dim = axis, vocab_dim
        return SplitLogits(local, axis, vocab, vocab_dim, writes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if isinstance(grad, SplitLogits):
            return to_local(grad), None, None, None, None
        return _columns(grad, ctx.vocab_dim, ctx.axis), None, None, None, None


class _ToLocal(Function):
    @staticmethod
    def forward(ctx: Any, x: SplitLogits) -> Tensor:
        ctx.like = (x.axis, x.vocab, x.vocab_dim)
        return x.local.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> SplitLogits:
        return _attached(grad, *ctx.like)


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: SplitLogits) -> Tensor:
        ctx.like = (x.axis, x.vocab, x.vocab_dim)
        return _gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> SplitLogits:
        axis, vocab, vocab_dim = ctx.like
        return _attached(_columns(grad, vocab_dim, axis), axis, vocab, vocab_dim)


def to_local(x: SplitLogits) -> Tensor:
    """This rank's columns of `x`, with its history."""
    x._up_to_date()
    return _ToLocal.apply(x) if torch.is_grad_enabled() else x.local


def _attached(local: Tensor, axis: Axis, vocab: int, vocab_dim: int, writes: list[int] | None = None) -> SplitLogits:
    """SplitLogits of these columns, with their history."""
    make = _FromLocal.apply if torch.is_grad_enabled() and local.requires_grad else SplitLogits
    return make(local, axis, vocab, vocab_dim, writes)


def _from_local(local: Tensor, vocab_dim: int, like: SplitLogits) -> SplitLogits:
    return _attached(local, like.axis, like.vocab, vocab_dim, like._writes)


def _gather(x: SplitLogits) -> Tensor:
    if torch.is_inference_mode_enabled():  # a tensor of inference mode would not count writes to it
        with torch.inference_mode(False):
            return _gather(x)
    with torch.no_grad():
        whole = width_to_replicate(x.local.movedim(x.vocab_dim, -1), x.axis, x.vocab)
        return whole.movedim(-1, x.vocab_dim).contiguous()


def _columns(whole: Tensor, dim: int, axis: Axis) -> Tensor:
    """This rank's part of `whole` along `dim`; backward all-gather."""
    return replicate_to_width(whole.movedim(dim, -1), axis).movedim(-1, dim)


def _sizes(x: SplitLogits) -> tuple[int, ...]:
    """`x.shape`, without a way round through `__torch_function__`."""
    return (*x.local.shape[: x.vocab_dim], x.vocab, *x.local.shape[x.vocab_dim + 1 :])


def _whole(tree: Any) -> Any:
    """The same arguments with every SplitLogits in them gathered."""
    if isinstance(tree, SplitLogits):
        return tree.full_tensor()
    if isinstance(tree, (tuple, list)):
        items = [_whole(item) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, dict):
        return {key: _whole(value) for key, value in tree.items()}
    return tree


def _has_split(tree: Any) -> bool:
    return isinstance(tree, SplitLogits) or (isinstance(tree, (tuple, list)) and any(_has_split(item) for item in tree))


# ---------------------------------------------------------------------------------------------------- writing in place


def _in_place(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Write to the whole of the first argument, then copy this rank's columns back."""
    x = args[0]
    everything = (*args, *kwargs.values())
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in everything):
        raise TPError(
            f"`{func.__name__}` writes in place to split logits {_sizes(x)} while a gradient is recorded. Write it out "
            "of place (`torch.where(mask, value, logits)`, `logits.masked_fill(mask, value)`, `logits * scale`), or "
            "under `torch.no_grad()`."
        )
    whole = x.full_tensor()
    out = func(whole, *_whole(args[1:]), **_whole(kwargs))
    if whole.shape != _sizes(x):
        raise TPError(f"`{func.__name__}` would change the shape of split logits {_sizes(x)} in place; give them a new name.")
    mine = even_shard(x.vocab, x.axis.rank, x.axis.size)
    x.local.copy_(whole.narrow(x.vocab_dim, mine.start, len(mine)))
    x._writes[0] += 1
    x._remember(whole)
    return x if out is whole else out


def _cannot_write(name: str) -> TPError:
    return TPError(
        f"`{name}` would write its result into split logits. Give it a plain tensor, such as `logits.full_tensor().clone()`."
    )


# -------------------------------------------------------------------------------- rules: what runs on the columns alone
#
# rule(func, args, kwargs) -> the result, or NotImplemented: gather. A rule decides by what is the same on all ranks, never
# by the columns: the ranks have to agree on whether they gather.


def _cross_entropy(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    from lightning_tp.loss import cross_entropy_of_split  # which builds on this file

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
    return replicate_to_gathered(a, like.axis) if torch.is_grad_enabled() and a.requires_grad else a


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


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_C10D = "torch.distributed.distributed_c10d"
_AS_IT_IS = _names(
    """attribute size dim ndimension numel nelement stride element_size get_device __len__ __format__ __dir__
    is_floating_point is_complex is_signed is_inference is_contiguous is_conj is_neg
    register_hook register_post_accumulate_grad_hook retain_grad requires_grad_ backward grad detach detach_"""
)
_COMPUTED = _names("T mT H mH real imag")  # attributes that are functions of the values

_NEW_SIZES: dict[str, Callable[..., list[int]]] = {
    **dict.fromkeys(_names("view reshape _unsafe_view"), _given),
    **dict.fromkeys(_names("view_as reshape_as"), _as_other),
    "flatten": _flattened,
    "unflatten": _unflattened,
}
_RULES: dict[str, Callable[..., Any]] = {
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
_DISPATCH_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_names("detach alias clone add sub mul div neg"), _pointwise),
    **dict.fromkeys(_names("zeros_like ones_like full_like empty_like new_zeros new_empty"), _new),
    "_to_copy": _cast,
    "view": _reshape,
    "_unsafe_view": _reshape,
}
