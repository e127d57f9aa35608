"""Logits that stay sharded by the vocabulary, and still are a tensor of the full shape for the code that uses them.

`SplitLogits` is what a vocabulary-parallel head returns. For B sequences of T tokens, V words and tp ranks:

| tensor | shape on a rank | full on |
|---|---|---|
| `logits` (`SplitLogits`) | shows (B, T, V), holds `.local` (B, T, V_local) | no rank |
| its gradient, where it comes from a parallel function | the same | no rank |
| `logits.full_tensor()`, and what any other function gets | (B, T, V) | all ranks, after an all-gather |

`__torch_function__` decides by the function, which has to be torch's own (another one of the same name is "any other function"):

- `F.cross_entropy` with class indices runs in parallel (see `cross_entropy.py`);
- pointwise functions, casts, reshapes, transposes and indexing that leave the vocabulary dim intact give `SplitLogits` again, without
  communication; plain tensors among their arguments are sliced to this rank's columns;
- shape, dtype, device, hooks and the like are answered at once, and `repr` shows shapes, not values;
- anything else all-gathers, once for each tensor and grad mode, and runs on the full tensor: right, forward and backward. The first time in a
  line of code, a warning says what it costs.

So all ranks of the axis have to run the same code on logits: `if rank == 0: logits.argmax(-1)` hangs. Writing in place works where no gradient
is recorded and raises `TPError` where one is. Copies (pickle, deepcopy) are full and plain. Autograd sees `SplitLogits` as it sees a `DTensor`
made by `from_local`: it may have hooks and retain its gradient, and the gradients that reach it are sharded, or full and equal on all ranks.
What bypasses `__torch_function__` (autograd's own sums, FSDP2, custom functions) arrives in `__torch_dispatch__`, under the same rules.
`torch.compile` breaks the graph here.
"""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import Function
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_tp._compat import NATIVE_FUNCTIONS, num_writes, without_torch_function_subclass, wrapper_tensor, written_arguments
from lightning_tp.core.comm.axis import Axis, even_shard
from lightning_tp.core.comm.fake_world import FakeGroup
from lightning_tp.core.comm.transitions import invariant_to_width, width_to_invariant
from lightning_tp.core.modules.call_site import users_line
from lightning_tp.errors import TPError

# function, method or attribute of torch -> what it does with split logits, and the same of its operators; filled by `logits_rules.py`, whose
# `split_logits` makes the first of them
RULES: dict[Any, Callable[..., Any]] = {}
DISPATCH_RULES: dict[Any, Callable[..., Any]] = {}


def torchs_own(name: str) -> list[Any]:
    """Return the functions, methods and attributes of torch that have this name.

    Example:
        >>> F.cross_entropy in torchs_own("cross_entropy"), torch.clamp in torchs_own("clamp"), len in torchs_own("cross_entropy")
        (True, True, False)
    """
    return _by_name()[name]


@cache
def _by_name() -> dict[str, list[Any]]:
    found = defaultdict(list)
    for place in (torch, Tensor, F, torch.special, torch.autograd, *NATIVE_FUNCTIONS):
        for name in dir(place):
            if callable(value := getattr(place, name, None)) or place is Tensor:
                found[getattr(value, "__name__", name)].append(value)  # that of `__pow__` is "pow"
    return found


class SplitLogits(Tensor):
    """Logits of the full shape, of which a rank holds the columns `even_shard(vocab, axis.rank, axis.size)`. Made by `split_logits`.

    Attributes:
        local: this rank's columns, detached.
        axis: the tensor-parallel axis.
        vocab: length of the sharded dim.
        vocab_dim: the sharded dim.
    """

    local: Tensor
    axis: Axis
    vocab: int
    vocab_dim: int
    _writes: list[int]  # in-place writes so far, one counter for all views of the same memory
    _gathered: Tensor | None  # the full tensor
    _gathered_version: tuple[int, int]  # the writes to this tensor, and to `_gathered`, when it was gathered

    @staticmethod
    def __new__(cls: Any, local: Tensor, axis: Axis, vocab: int, vocab_dim: int, writes: list[int] | None = None) -> SplitLogits:
        """Make one without autograd history."""
        sizes = list(local.shape)
        sizes[vocab_dim] = vocab
        x = wrapper_tensor(cls, sizes, dtype=local.dtype, device=local.device)
        x.local, x.axis, x.vocab, x.vocab_dim = local.detach() if local.requires_grad else local, axis, vocab, vocab_dim
        x._writes = [0] if writes is None else writes
        x._gathered = None
        return x

    def full_tensor(self) -> Tensor:
        """Return the full logits on every rank, a plain tensor to read from. Differentiable; an all-gather, the first time."""
        record = torch.is_grad_enabled() and self.requires_grad
        full = self._current_full()
        if full is not None and (full.requires_grad or not record):
            return full if record else full.detach()
        full = _Gather.apply(self) if record else _gather(self)
        self._keep_full(full)
        return full

    def _current_full(self) -> Tensor | None:
        """Return the full tensor, if it has been gathered since the last in-place write.

        Raises:
            TPError: if somebody wrote to it, through a slice that seemed to be a view of the logits.
        """
        if self._gathered is None or self._gathered_version[0] != self._writes[0]:
            return None
        if num_writes(self._gathered) != self._gathered_version[1]:
            raise TPError(
                "A slice of vocab-parallel logits along the vocabulary was written in place, which does not change the logits. Write to the "
                "logits themselves under `torch.no_grad()` (`logits[..., 5] = value`), or use `full = logits.full_tensor()` from the start."
            )
        return self._gathered

    def _keep_full(self, full: Tensor) -> None:
        self._gathered, self._gathered_version = full, (self._writes[0], num_writes(full))

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return (
            f"SplitLogits(shape={full_sizes(self)}, dtype={self.local.dtype}, vocab_dim={self.vocab_dim}, local shape="
            f"{tuple(self.local.shape)} on rank {self.axis.rank} of {self.axis.size}; values: full_tensor())"
        )

    @classmethod
    @torch.compiler.disable
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, key = getattr(func, "__name__", type(func).__name__), func
        if name in ("__get__", "__set__") and hasattr(func, "__self__"):
            key = func.__self__
            attribute = key.__name__
            if name == "__get__" or attribute != "data":
                name = attribute if attribute in _COMPUTED else "attribute"
        if args and (rule := RULES.get(key)) is not None:
            out = rule(func, args, kwargs)
            if out is not NotImplemented:
                return out
        if name == "attribute" or key in _METADATA or isinstance(func, OpOverload) or getattr(func, "__module__", None) == _C10D:
            with without_torch_function_subclass():  # an operator or a collective comes to __torch_dispatch__
                return func(*args, **kwargs)
        if _holds_split(kwargs.get("out")):
            raise _cannot_write(name)
        in_place = name in ("__setitem__", "__set__") or (name == name.rstrip("_") + "_" and func in torchs_own(name))
        _tell_of_gather(name, args, kwargs)
        if in_place and isinstance(args[0], SplitLogits):
            return _in_place(func, args, kwargs)
        return func(*_gathered_in(args), **_gathered_in(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch.no_grad():  # autograd, if it records, has done so above
            if (rule := DISPATCH_RULES.get(func.overloadpacket)) is not None:
                out = rule(func, args, kwargs)
                if out is not NotImplemented:
                    return out
            name = func.overloadpacket.__name__
            _tell_of_gather(name, args, kwargs)
            written = [
                value for i, n in written_arguments(func) if _holds_split(value := args[i] if i < len(args) else kwargs.get(n))
            ]
            if written and args and written[0] is args[0] and isinstance(args[0], SplitLogits):
                return _in_place(func, args, kwargs)
            if written:
                raise _cannot_write(name)
            return func(*_gathered_in(args), **_gathered_in(kwargs))


class _FromLocal(Function):
    """This rank's columns -> SplitLogits. Backward: a gradient, sharded or full -> this rank's columns."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, axis: Axis, vocab: int, vocab_dim: int, writes: list[int] | None) -> SplitLogits:
        ctx.axis, ctx.vocab_dim = axis, vocab_dim
        return SplitLogits(local, axis, vocab, vocab_dim, writes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if isinstance(grad, SplitLogits):
            return to_local(grad), None, None, None, None
        return local_columns(grad, ctx.vocab_dim, ctx.axis), None, None, None, None


class _ToLocal(Function):
    @staticmethod
    def forward(ctx: Any, x: SplitLogits) -> Tensor:
        ctx.layout = (x.axis, x.vocab, x.vocab_dim)
        return x.local.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> SplitLogits:
        return wrap_columns(grad, *ctx.layout)


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: SplitLogits) -> Tensor:
        ctx.layout = (x.axis, x.vocab, x.vocab_dim)
        return _gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> SplitLogits:
        axis, vocab, vocab_dim = ctx.layout
        return wrap_columns(local_columns(grad, vocab_dim, axis), axis, vocab, vocab_dim)


def to_local(x: SplitLogits) -> Tensor:
    """Return this rank's columns, with their autograd history."""
    x._current_full()
    return _ToLocal.apply(x) if torch.is_grad_enabled() else x.local


def wrap_columns(local: Tensor, axis: Axis, vocab: int, vocab_dim: int, writes: list[int] | None = None) -> SplitLogits:
    """Make SplitLogits of this rank's columns, with their autograd history."""
    make = _FromLocal.apply if torch.is_grad_enabled() and local.requires_grad else SplitLogits
    return make(local, axis, vocab, vocab_dim, writes)


def wrap_columns_like(local: Tensor, vocab_dim: int, like: SplitLogits) -> SplitLogits:
    """Make SplitLogits of this rank's columns, on the axis of `like`, and a view of it as far as in-place writes go."""
    return wrap_columns(local, like.axis, like.vocab, vocab_dim, like._writes)


def _gather(x: SplitLogits) -> Tensor:
    if torch.is_inference_mode_enabled():  # tensors of inference mode don't count writes to them
        with torch.inference_mode(False):
            return _gather(x)
    with torch.no_grad():
        full = width_to_invariant(x.local.movedim(x.vocab_dim, -1), x.axis, x.vocab)
        return full.movedim(-1, x.vocab_dim).contiguous()


def local_columns(full: Tensor, dim: int, axis: Axis) -> Tensor:
    """Return this rank's shard of a tensor along `dim`; backward all-gather."""
    return invariant_to_width(full.movedim(dim, -1), axis).movedim(-1, dim)


def full_sizes(x: SplitLogits) -> tuple[int, ...]:
    """Return `x.shape`, without the detour through `__torch_function__`."""
    return (*x.local.shape[: x.vocab_dim], x.vocab, *x.local.shape[x.vocab_dim + 1 :])


def _gathered_in(tree: Any) -> Any:
    """The same arguments with every SplitLogits in them all-gathered."""
    return tree_map_only(SplitLogits, SplitLogits.full_tensor, tree)


def _tell_of_gather(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    """Warn of an all-gather that a function needs, once for each line of the user's code and function."""
    for x in tree_leaves((args, kwargs)):
        if not isinstance(x, SplitLogits) or x.axis.size == 1 or x.axis.rank or isinstance(x.axis.group, FakeGroup):
            continue
        where = users_line(sys._getframe(2))
        if x._gathered is None and (name, where) not in _told:
            _told.add((name, where))
            nbytes = x.local.element_size() * x.numel()
            warnings.warn(
                f"{where}: `{name}` needs all columns of the logits {full_sizes(x)}, which every rank keeps a shard of, so they are all-gathered: "
                f"{nbytes:,} bytes on each rank, every time. The result is right. `logits.full_tensor()` says that it is meant; "
                "`F.cross_entropy` and pointwise functions need none.",
                stacklevel=2,
            )


_told: set[tuple[str, str]] = set()


def _holds_split(tree: Any) -> bool:
    return any(isinstance(leaf, SplitLogits) for leaf in tree_leaves(tree))


def _in_place(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Write to the full tensor of the first argument, then copy this rank's columns back."""
    x = args[0]
    everything = (*args, *kwargs.values())
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in everything):
        raise TPError(
            f"`{func.__name__}` writes in place to vocab-parallel logits {full_sizes(x)} while a gradient is recorded. Use an out-of-place "
            "function (`torch.where(mask, value, logits)`, `logits.masked_fill(mask, value)`, `logits * scale`), or `torch.no_grad()`."
        )
    full = x.full_tensor()
    out = func(full, *_gathered_in(args[1:]), **_gathered_in(kwargs))
    if full.shape != full_sizes(x):
        raise TPError(
            f"`{func.__name__}` would change the shape of vocab-parallel logits {full_sizes(x)} in place. Use the out-of-place function."
        )
    columns = even_shard(x.vocab, x.axis.rank, x.axis.size)
    x.local.copy_(full.narrow(x.vocab_dim, columns.start, len(columns)))
    x._writes[0] += 1
    x._keep_full(full)
    return x if out is full else out


def _cannot_write(name: str) -> TPError:
    return TPError(
        f"`{name}` would write its result into vocab-parallel logits. Give it a plain tensor, such as `logits.full_tensor().clone()`."
    )


_C10D = "torch.distributed.distributed_c10d"
_COMPUTED = {"T", "mT", "H", "mH", "real", "imag"}  # attributes that are functions of the values
_METADATA_NAMES = """size dim ndimension numel nelement stride element_size get_device __len__ __format__ __dir__ is_floating_point
    is_complex is_signed is_inference is_contiguous is_conj is_neg register_hook register_post_accumulate_grad_hook retain_grad requires_grad_
    backward grad detach detach_"""
_METADATA = frozenset(function for name in _METADATA_NAMES.split() for function in torchs_own(name))
