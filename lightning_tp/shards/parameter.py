"""Sharded parameters that user code sees in full: shapes, values, gradients and writes in place are those of the full tensor.

After `parallelize`, a parameter is the same object as before, of the class `ShardedParameter` (under FSDP2 `ShardedDTensor`), and its memory is this
rank's shard. What it is seen as depends on where it is used:

| where | seen as |
|---|---|
| in the forward of the model, in `optimizer.step`, in clipping (`local_view`) | the plain local tensor; no dispatch, as fast as a plain one |
| anywhere else: a step, a hook, a callback, a script | the full tensor |

`p.norm()`, `p.pow(2).sum()`, `p @ p.T` all-gather, differentiably: the gradient that comes back is this rank's shard, and is counted once where ranks
hold the same elements. `p.mul_(mask)`, `p.data.copy_(full)`, `nn.init.normal_(p)` and `p.grad.add_(x)` compute the full result on every rank and keep
this rank's shard. `p.shape`, `p.numel()` and the like cost nothing. A gather is a collective: every rank of the mesh has to get there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.hooks import RemovableHandle

from lightning_tp._compat import (
    call_impl,
    graph_task,
    keep_foreach,
    local_tensor,
    storage_key,
    without_torch_function_subclass,
)
from lightning_tp.core.comm.mesh import DATA_PARALLEL
from lightning_tp.core.comm.state import R
from lightning_tp.errors import TPError
from lightning_tp.shards import functions
from lightning_tp.shards.shard import ParamShard, like
from lightning_tp.shards.view import depth, follow_view, full_runs, local_view

# ------------------------------------------------------------------------------------------------------------- classes


class _Sharded:
    """What a sharded tensor does in either view."""

    _tp_shard: ParamShard

    def full_tensor(self, **_: Any) -> Tensor:
        """Return the full tensor on every rank, differentiably. A collective."""
        return _full(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with local_view():
            copied = super().__deepcopy__(memo)  # type: ignore[misc]
            return shard_like(copied, self._tp_shard)

    def __reduce_ex__(self, protocol: Any) -> Any:
        full = self.full_tensor().detach() if depth() <= 0 else local_tensor(self)  # type: ignore[arg-type]
        return (nn.Parameter(full, self.requires_grad) if isinstance(self, nn.Parameter) else full).__reduce_ex__(protocol)

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Register a hook that is given the full gradient of a backward pass, when the pass is over; see `torch.Tensor.register_hook`."""
        gradients = getattr(self, "_tp_gradients", None)
        if gradients is None:
            with local_view():
                return Tensor.register_hook(self, hook)  # type: ignore[arg-type]
        return gradients.add_hook(self, hook)

    def register_post_accumulate_grad_hook(self, hook: Callable[[Tensor], None]) -> RemovableHandle:
        """Register a hook that runs once the full gradient is in `.grad`; see `torch.Tensor.register_post_accumulate_grad_hook`."""
        gradients = getattr(self, "_tp_gradients", None)
        if gradients is None:
            with local_view():
                return Tensor.register_post_accumulate_grad_hook(self, hook)  # type: ignore[arg-type]
        return gradients.add_hook(self, hook, accumulated=True)


class _Local(_Sharded):
    def to_local(self) -> Tensor:
        """Return this rank's shard as a plain tensor, which shares its memory; as `DTensor.to_local`."""
        return local_tensor(self)  # type: ignore[arg-type]


class ShardedParameter(_Local, nn.Parameter):
    """A parameter of which this rank holds the shard `_tp_shard` says."""


class ShardedTensor(_Local, Tensor):
    """What was read from a sharded parameter (`.data`, `.detach()`, `.grad`, a copy), and is sharded like it."""


class ShardedDTensor(_Sharded, DTensor):
    """The same under FSDP2: its DTensor over the data-parallel axis, of a shard over the tensor-parallel one."""

    def detach(self) -> Any:
        """Return it without history; of this class in either view, as `nn.Parameter` asks for when a module is moved."""
        with without_torch_function_subclass():
            return shard_like(DTensor.detach(self), self._tp_shard)


SHARDED = (ShardedParameter, ShardedTensor, ShardedDTensor)
keep_foreach(*SHARDED)


class FullView(Tensor):
    """A view of the full tensor: what is written into it goes to this rank's shard as well."""

    _tp_of: Any
    _tp_full: Tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function, and write back what it has written."""
        with without_torch_function_subclass():
            out = func(*args, **(kwargs or {}))
        view = next((x for x in args if isinstance(x, FullView)), None)
        if view is not None and _writes(func.__name__):
            _write_back(view._tp_of, view._tp_full)
        if view is None or func.__name__ not in functions.VIEWS | {"__get__"}:
            return out
        return _tracked(out, view._tp_of, view._tp_full)


def _tracked(tree: Any, of: Any, full: Tensor) -> Any:
    """The same views, as ones whose writes go to the shard of `of`."""

    def track(x: Any) -> Any:
        if not isinstance(x, Tensor) or storage_key(x) != storage_key(full):
            return x
        view = x.as_subclass(FullView)
        view._tp_of, view._tp_full = of, full
        return view

    return tree_map(track, tree)


def _write_back(x: Any, full: Tensor) -> None:
    with local_view(), torch.no_grad():
        for y in (x, getattr(x, "_tp_sharded", None)):  # what FSDP2 has unsharded for a forward is let go again
            if y is not None:
                local_tensor(y).copy_(y._tp_shard.take(full))


def _requires_grad(x: Any) -> bool:
    with local_view():
        return bool(x.requires_grad)


def shard_like(tensor: Any, shard: ParamShard) -> Any:
    """Mark a local tensor (or FSDP2's DTensor) as a shard, and return it. On a mesh of one rank it stays a plain tensor."""
    tensor._tp_shard = shard
    if shard.mesh.size() == 1:
        return tensor
    if isinstance(tensor, DTensor):
        tensor.__class__ = ShardedDTensor
    else:
        tensor.__class__ = ShardedParameter if isinstance(tensor, nn.Parameter) else ShardedTensor
    return tensor


# -------------------------------------------------------------------------------------------------------- seen in full


def _seen_in_full(
    cls: type, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
) -> Any:
    kwargs = kwargs or {}
    if not depth() and graph_task() != -1:
        return _as_it_is(func, args, kwargs)  # in a backward pass: what the forward has saved, FSDP2, compiled code
    name = func.__name__
    if name in ("__get__", "__set__", "__delete__"):
        return _attribute(func, args, kwargs)
    if name in functions.AS_IT_IS or in_forward():
        return _as_it_is(func, args, kwargs)
    rule = _autograd_grad if func is torch.autograd.grad else _RULES.get(name)
    if rule is not None and (out := rule(func, args, kwargs)) is not NotImplemented:
        return out
    if isinstance(kwargs.get("out"), SHARDED):
        raise TPError(
            f"`{name}(.., out=..)` would write into a sharded parameter. Use `p.copy_({name}(..))` under `torch.no_grad()`."
        )
    return _write(func, args, kwargs) if _writes(name) else func(*_in_full(args), **_in_full(kwargs))


for _cls in SHARDED:
    follow_view(_cls, classmethod(_seen_in_full))


def in_forward() -> bool:
    """Return whether the forward of a split module runs that nobody has called through its entry: recomputed in a backward pass, or a method of it.

    A hook of a module is not its forward.
    """
    if full_runs():
        return False
    frame: FrameType | None = sys._getframe(2)
    inner = None
    while frame is not None:
        if inner is not None and frame.f_code is MODULE_CALL and inner.f_code.co_name not in _FORWARDS:
            return False  # a hook
        if frame.f_code.co_name == "forward" and "_tp_planned" in getattr(frame.f_locals.get("self"), "__dict__", ()):
            return True
        inner, frame = frame, frame.f_back
    return False


def _attribute(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Read or set an attribute: `func` is `__get__` or `__set__` of a descriptor."""
    x, name, reads = args[0], func.__self__.__name__, func.__name__ == "__get__"  # type: ignore[attr-defined]
    if reads and name in functions.VALUE_ATTRIBUTES:
        return _view(func, args, kwargs)
    if not isinstance(x, SHARDED) or (name in functions.SHAPE_ATTRIBUTES and in_forward()):
        return _as_it_is(func, args, kwargs)
    return (_READ if reads else _WRITE).get(name, _as_it_is)(func, args, kwargs)


def _view(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    x = args[0] if args else None
    if not isinstance(x, SHARDED) or (torch.is_grad_enabled() and _requires_grad(x)):
        return func(*_in_full(args), **_in_full(kwargs))
    full = _full(x)
    return _tracked(func(full, *_in_full(args[1:]), **_in_full(kwargs)), x, full)


def _pointer(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Return a pointer, which the full tensor has to outlive."""
    full = args[0].__dict__["_tp_full"] = _full(args[0])
    out = func(full, *args[1:], **kwargs)
    if func.__name__ == "numpy":
        out.setflags(write=False)  # a write would not come back
    return out


def _alike(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`detach`, `zeros_like`: sharded as the argument is."""
    return shard_like(_as_it_is(func, args, kwargs), args[0]._tp_shard) if args and isinstance(args[0], SHARDED) else NotImplemented


def _sizes(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return func(_meta(args[0]), *args[1:], **kwargs)


def _as_it_is(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    with without_torch_function_subclass():
        return func(*args, **kwargs)


def _meta(x: Any) -> Tensor:
    return torch.empty(x._tp_shard.shape, dtype=x.dtype, device="meta")


def _read_shape(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return func(_meta(args[0]))


def _read_tensor(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`.data`, `.grad`: sharded as the parameter is."""
    found = _as_it_is(func, args, kwargs)
    if found is None or (hasattr(args[0], "_tp_sharded") and func.__self__.__name__ == "grad"):  # type: ignore[attr-defined]
        return found  # FSDP2 alone reads gradients that are not reduced yet
    return shard_like(found, args[0]._tp_shard)


def _write_tensor(func: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """`p.data = x`, `p.grad = x`: x is full, or sharded."""
    p, value = args
    shard: ParamShard = p._tp_shard
    if isinstance(value, Tensor) and not isinstance(value, DTensor) and not isinstance(value, SHARDED):
        if tuple(value.shape) != shard.shape:
            raise TPError(
                f"`{shard.name}` has the shape {shard.shape}, but was to be given a tensor of the shape {tuple(value.shape)}: after the split, "
                "sizes are fixed. Resize the model in `__init__` or `configure_model`."
            )
        value = like(p, shard.take(value.detach()))
    if isinstance(p, DTensor) and func.__self__.__name__ == "data":  # type: ignore[attr-defined]
        with local_view(), torch.no_grad():  # setting `.data` of a DTensor leaves its local tensor as it was
            local_tensor(p).copy_(local_tensor(value))
        return
    _as_it_is(func, (p, value), kwargs)


def _on_shards(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A pointwise function or a copy of tensors that are sharded alike, where no gradient is recorded: runs on the shards."""
    tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
    sharded = [x for x in tensors if isinstance(x, SHARDED)]
    others = [x for x in tensors if not isinstance(x, SHARDED)]
    if torch.is_grad_enabled() and any(map(_requires_grad, tensors)):
        return NotImplemented
    shard = sharded[0]._tp_shard
    alike = all((x._tp_shard.split, x._tp_shard.shape) == (shard.split, shard.shape) for x in sharded)
    if _writes(func.__name__) and any(hasattr(x, "_tp_sharded") for x in sharded):
        return NotImplemented
    if not alike or any(x.ndim for x in others) or len({isinstance(x, DTensor) for x in sharded}) > 1:
        return NotImplemented
    with local_view():
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and not isinstance(out, SHARDED) and out.shape == sharded[0].shape:
            return shard_like(out, shard)
        return out


def _writes(name: str) -> bool:
    return name in functions.WRITES or (name.endswith("_") and not name.endswith("__"))


def _write(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Write in place: into the full tensors, of which each rank then keeps its shards."""
    written = [x for x in tree_iter(args[0] if args else next(iter(kwargs.values()))) if isinstance(x, SHARDED)]
    if torch.is_grad_enabled() and any(map(_requires_grad, written)):
        raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
    full = {id(x): _full(x).detach() for x in written}

    def in_full(x: Any) -> Any:
        return full[id(x)] if id(x) in full else _full(x) if isinstance(x, SHARDED) else x

    out = func(*tree_map(in_full, args), **tree_map(in_full, kwargs))
    for x in written:
        if tuple(full[id(x)].shape) != x._tp_shard.shape:
            raise TPError(f"`{func.__name__}` would change the shape of `{x._tp_shard.name}` {x._tp_shard.shape} in place.")
        _write_back(x, full[id(x)])
    return written[0] if isinstance(out, Tensor) and len(written) == 1 and out is full[id(written[0])] else out


def _autograd_grad(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`torch.autograd.grad`: the gradients of parameters in full, whatever ranks compute terms of them."""
    names = ("outputs", "inputs")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    inputs = list(given["inputs"]) if isinstance(given["inputs"], (tuple, list)) else [given["inputs"]]
    with local_view():
        of = next((x._tp_gradients for x in inputs if hasattr(x, "_tp_gradients")), None)
        if of is None:
            return func(*args, **kwargs)
        if any(isinstance(x, DTensor) for x in inputs):
            raise TPError(
                "`torch.autograd.grad` of parameters that FSDP2 shards (dp > 1): FSDP2 only makes gradients in `backward()`. Call "
                "`loss.backward()` and read `p.grad`, or use dp=1."
            )
        found = of.grads_of(inputs, lambda: func(*args, **kwargs))
        return tuple(
            g if g is None or not hasattr(x, "_tp_shard") else shard_like(g, x._tp_shard)
            for x, g in zip(inputs, found, strict=True)
        )


# ---------------------------------------------------------------------------------------------------------- full tensors


def _in_full(tree: Any) -> Any:
    return tree_map(lambda x: _full(x) if isinstance(x, SHARDED) else x, tree)


def _full(x: Any) -> Tensor:
    with local_view():
        if torch.is_grad_enabled() and x.requires_grad:
            return _Full.apply(x)
        return _gather(x)


def _gather(x: Any) -> Tensor:
    shard: ParamShard = x._tp_shard
    if shard.split.dim is not None and shard.tp > 1:
        shard.meet()
    return shard.gather(x)


class _Full(Function):
    """A shard -> the full tensor. Backward: this rank's shard of the gradient, and each element on one of the ranks whose terms are summed."""

    @staticmethod
    def forward(ctx: Any, p: Any) -> Tensor:
        ctx.p = p
        return _gather(p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        p = ctx.p
        shard: ParamShard = p._tp_shard
        with local_view(), torch.no_grad():
            if shard.split.state is None:
                p = getattr(p, "_tp_sharded", p)
                shard = p._tp_shard
            if shard.fsdp:  # FSDP2 takes the mean over the data-parallel axis of what runs through it, so here as well
                grad = grad.contiguous()
                dist.all_reduce(grad, group=shard.mesh.get_group(DATA_PARALLEL))
                grad = grad / shard.mesh[DATA_PARALLEL].size()
            local = shard.take(grad)
            gradients = getattr(p, "_tp_gradients", None)
            if gradients is not None:
                gradients.begin()
                if shard.split.state is None:  # whether other terms of it are summed is not known yet
                    gradients.add_equal(p, local)
                    return torch.zeros_like(ctx.p)
            if shard.split.state == R and shard.tp_rank:
                local.zero_()
            elif shard.sum_over > 1 and shard.tp_rank % shard.sum_over:
                shard.summed_part(local).zero_()
            return like(p, local)


MODULE_CALL = call_impl.__code__
_FORWARDS = ("forward", "inner", "_call_impl", "__call__")
_READ = {**dict.fromkeys(functions.SHAPE_ATTRIBUTES, _read_shape), "data": _read_tensor, "grad": _read_tensor}
_WRITE = {"data": _write_tensor, "grad": _write_tensor}
_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(functions.VIEWS, _view),
    **dict.fromkeys(functions.POINTERS, _pointer),
    **dict.fromkeys(functions.SIZES, _sizes),
    **dict.fromkeys(functions.ALIKE, _alike),
    **dict.fromkeys(functions.COPIES | functions.POINTWISE, _on_shards),
}
