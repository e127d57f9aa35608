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

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import Function

from lightning_tp.core.comm.axis import Axis, even_shard
from lightning_tp.core.comm.transitions import invariant_to_width, width_to_invariant
from lightning_tp.errors import TPError

# name of a function, or of an operator -> what it does with split logits; filled by `logits_rules.py`, which makes the first tensor of this kind
RULES: dict[str, Callable[..., Any]] = {}
DISPATCH_RULES: dict[str, Callable[..., Any]] = {}


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
        if args and (rule := RULES.get(name)) is not None:
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
            if (rule := DISPATCH_RULES.get(name)) is not None:
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
        whole = width_to_invariant(x.local.movedim(x.vocab_dim, -1), x.axis, x.vocab)
        return whole.movedim(-1, x.vocab_dim).contiguous()


def _columns(whole: Tensor, dim: int, axis: Axis) -> Tensor:
    """This rank's part of `whole` along `dim`; backward all-gather."""
    return invariant_to_width(whole.movedim(dim, -1), axis).movedim(-1, dim)


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


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_C10D = "torch.distributed.distributed_c10d"


_AS_IT_IS = _names(
    """attribute size dim ndimension numel nelement stride element_size get_device __len__ __format__ __dir__
    is_floating_point is_complex is_signed is_inference is_contiguous is_conj is_neg
    register_hook register_post_accumulate_grad_hook retain_grad requires_grad_ backward grad detach detach_"""
)


_COMPUTED = _names("T mT H mH real imag")  # attributes that are functions of the values
