"""Run a changed call with this rank's sizes and operands."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.fake_world import FakeGroup
from lightning_tp.core.comm.sequence import full_length
from lightning_tp.core.comm.state import P
from lightning_tp.core.comm.transitions import invariant_to_replicate, replicate_to_invariant, transition
from lightning_tp.core.ops.logits_rules import split_logits
from lightning_tp.core.ops.stream_shard import StreamShard
from lightning_tp.errors import TPError
from lightning_tp.styles.calls.call import CONVOLUTIONS, COUNTS, FIRST_SIZE, READS, Call, Operand, Path
from lightning_tp.styles.split import Ownership

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

PRODUCTS_WITH_SUMMAND: dict[str, Callable[..., Any]] = {"addmm": torch.mm, "baddbmm": torch.bmm, "addmv": torch.mv}


def run_call(call: Call, func: Callable[..., Any], args: Args, kwargs: Kwargs, axis: Axis) -> Any:
    """Call a torch function with what changes in it on this rank; `TPError` if a size is not what it was when the plan was made."""
    rank = axis.rank
    if call.name in READS:
        if type(args[0]) is StreamShard:
            return func(*args, **kwargs)
        return _full_size(call, args, kwargs, axis)
    if call.operands:
        args, kwargs = _with_operands(call, args, kwargs, axis)
    if call.sizes:
        args = _with_sizes(call, args, rank)
    if call.pieces:
        dim = kwargs["dim"] if "dim" in kwargs else args[2] if len(args) > 2 else 0
        return torch.split(args[0], list(call.pieces[rank]), dim)
    if call.items:
        args = (args[0], _with_item(args[0], args[1], call.items[rank]))
    if call.groups and len(args) > 6:
        args = (*args[:6], call.groups[rank], *args[7:])
    elif call.groups:
        kwargs = {**kwargs, "groups": call.groups[rank]}
    if call.leave:
        return _reduced(call, func, args, kwargs, axis)
    out = func(*args, **kwargs)
    if any(o.leave for o in call.operands):
        return tree_map_only(Tensor, lambda t: invariant_to_replicate(t, axis) if t.requires_grad else t, out)
    return out if call.logits is None else split_logits(out, axis, call.logits)


def _full_size(call: Call, args: Args, kwargs: Kwargs, axis: Axis) -> Any:
    """Return the size that code would read from the full tensor."""
    sizes = list(args[0].size())
    for at, num, den in call.sizes[axis.rank] if call.sizes else ():
        sizes[at] = full_length(args[0], axis) if den == -1 else sizes[at] * num // den if den else num
    if call.name in COUNTS:
        return sizes[0] if call.name == "__len__" else math.prod(sizes)
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return torch.Size(sizes) if dim is None or call.name != "size" else sizes[dim]


def _with_operands(call: Call, args: Args, kwargs: Kwargs, axis: Axis) -> tuple[Args, Kwargs]:
    new = [list(a) if isinstance(a, (list, tuple)) and not isinstance(a, torch.Size) else a for a in args]
    kwargs = dict(kwargs)
    for operand in call.operands:
        holder = _holder(operand.path, new, kwargs)
        x = holder[operand.path[-1]]
        if operand.full is not None:
            x = _full_parameter(x, operand.full, axis)
        if operand.enter and x.requires_grad:
            x = invariant_to_replicate(x, axis)
        if operand.leave and x.requires_grad:
            x = replicate_to_invariant(x, axis)
        if operand.part is not None and not _is_local(x, operand, new, kwargs):
            x = part_of(x, operand.part, axis.rank)
        holder[operand.path[-1]] = x
    return tuple(tuple(n) if isinstance(a, tuple) else n for n, a in zip(new, args, strict=True)), kwargs


def _full_parameter(x: Any, shape: tuple[int, ...], axis: Axis) -> Tensor:
    if hasattr(x, "full_tensor"):
        full: Tensor = x.full_tensor()
        return full
    if isinstance(axis.group, FakeGroup):  # there are no other ranks
        return x.new_zeros(shape) + x.sum()
    raise TPError(
        f"The model's forward reads a parameter of shape {shape} beside its products (a penalty on weights), and FSDP2 keeps a shard of it. Read it "
        "in `training_step` instead, or replicate it."
    )


def _holder(path: Path, args: list[Any], kwargs: Kwargs) -> Any:
    """Return the container in which the last step of a path is looked up."""
    holder: Any = args if isinstance(path[0], int) else kwargs
    for step in path[:-1]:
        holder = holder[step]
    return holder


def _is_local(x: Tensor, operand: Operand, args: list[Any], kwargs: Kwargs) -> bool:
    """Return whether code has made an operand in the size of the shard beside it."""
    if operand.beside is None or operand.part is None:
        return False
    other = _holder(operand.beside, args, kwargs)[operand.beside[-1]]
    from_last = operand.part[0]
    return bool(x.ndim >= from_last and x.shape[-from_last] == other.shape[-from_last])


def part_of(x: Tensor, part: tuple[int, Ownership], rank: int) -> Tensor:
    """Return a rank's part, (dim counted from the last, which rank owns which index), of an operand that every rank has whole.

    Where the dim is missing or of length 1, it broadcasts and stays. `TPError` if the ownership does not fit its length.

    Example:
        >>> part_of(torch.arange(4), (1, Ownership(((0, 2), (1, 2)))), rank=1)
        tensor([2, 3])
    """
    from_last, ownership = part
    dim = x.ndim - from_last
    if dim < 0 or x.shape[dim] == 1:
        return x
    ranges = ownership.ranges(rank)
    if x.shape[dim] == ownership.period and len(ranges) == 1:
        return x.narrow(dim, ranges[0][0], ranges[0][1] - ranges[0][0])
    if x.shape[dim] % ownership.period:
        raise TPError(
            f"This rank takes its part along dim {dim} of an operand of shape {tuple(x.shape)}, but {x.shape[dim]} is not a multiple of "
            f"{ownership.period}, as it was when the plan was made. Infer the plan from inputs of these shapes."
        )
    return x.index_select(dim, _index(ownership, rank, x.shape[dim], x.device))


@lru_cache(maxsize=256)
def _index(ownership: Ownership, rank: int, length: int, device: torch.device) -> Tensor:
    return ownership.index(rank, length).to(device)


def _with_sizes(call: Call, args: Args, rank: int) -> Args:
    first = FIRST_SIZE.get(call.name, 1)
    packed = len(args) == first + 1 and isinstance(args[first], (tuple, list, torch.Size))
    sizes = list(args[first] if packed else args[first:])
    for at, num, den in call.sizes[rank]:
        if den and sizes[at] * num % den:
            raise TPError(
                f"`{call.name}{tuple(sizes)}`: size {sizes[at]} at position {at} is not a multiple of {den}, as it was when the plan was made. "
                "Infer the plan from inputs of these shapes."
            )
        sizes[at] = sizes[at] * num // den if den else num
    return (*args[:first], tuple(sizes))


def _with_item(x: Tensor, item: Any, change: tuple[int, ...]) -> Any:
    position, start, stop, step, *length = change
    items = item if isinstance(item, tuple) else (item,)
    dim = dim_of_item(items, position, x.ndim)
    if length and dim is not None and x.shape[dim] != length[0]:
        raise TPError(
            f"A slice of dim {dim}, whose length on this rank is {x.shape[dim]}, and was {length[0]} when the plan was made. Infer the plan "
            "from a batch of this size, or replicate the weights of this module (`Rule(name, 'replicate')`)."
        )
    new = (*items[:position], slice(start, stop, step), *items[position + 1 :])
    return new if isinstance(item, tuple) else new[0]


def dim_of_item(items: Sequence[Any], position: int, ndim: int) -> int | None:
    """Return the dim that one part of an index `x[items]` is about; None for one that makes a dim, or for an ellipsis.

    Example:
        >>> dim_of_item((..., None, slice(0, 2)), 2, ndim=4)
        3
    """
    if items[position] is None or items[position] is Ellipsis:
        return None
    counts = [0 if i is None or i is Ellipsis else i.ndim if isinstance(i, Tensor) and i.dtype == torch.bool else 1 for i in items]
    rest = ndim - sum(counts) if any(i is Ellipsis for i in items[:position]) else 0
    return sum(counts[:position]) + rest


def _reduced(call: Call, func: Callable[..., Any], args: Args, kwargs: Kwargs, axis: Axis) -> Any:
    """Run a product with a row-wise weight, and reduce its partial sums; a bias is added once."""
    func, args, kwargs, bias = _without_bias(call.name, func, args, kwargs)
    reduce = transition(P, call.to)
    out = func(*args, **kwargs)
    if reduce is not None:
        out = reduce(out, axis)
    elif bias is not None and axis.rank:
        bias = bias * 0  # added to the partial sum of rank 0; it has a gradient on all ranks
    return out if bias is None else out + bias


def _without_bias(name: str, func: Callable[..., Any], args: Args, kwargs: Kwargs) -> tuple[Any, Args, Kwargs, Tensor | None]:
    """Take the bias out of a call, in a shape that broadcasts against its result."""
    if name in PRODUCTS_WITH_SUMMAND and len(args) == 3:
        bias = args[0] if kwargs.get("beta", 1) == 1 else args[0] * kwargs["beta"]
        return PRODUCTS_WITH_SUMMAND[name], (args[1] * kwargs.get("alpha", 1), args[2]), {}, bias
    if func is not torch.nn.functional.linear and name not in CONVOLUTIONS:
        return func, args, kwargs, None
    bias = kwargs.get("bias", args[2] if len(args) > 2 else None)
    kwargs = {k: v for k, v in kwargs.items() if k != "bias"}
    if bias is not None and name in CONVOLUTIONS:  # beside the channels
        bias = bias.view(-1, *[1] * ((kwargs["weight"] if "weight" in kwargs else args[1]).ndim - 2))
    return func, (*args[:2], None, *args[3:]) if len(args) > 2 else args, kwargs, bias
