"""Run a changed call with this rank's sizes and operands."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.sequence import full_length
from lightning_tp.core.comm.state import P
from lightning_tp.core.comm.transitions import invariant_to_replicate, transition
from lightning_tp.errors import TPError
from lightning_tp.styles.calls.call import CONVOLUTIONS, COUNTS, FIRST_SIZE, READS, WITH_BIAS, Call, Operand
from lightning_tp.styles.split import Ownership


def run_call(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], axis: Axis) -> Any:
    """Make the call with what changes on this rank."""
    rank = axis.rank
    if call.name in READS:
        return _whole_read(call, args, kwargs, axis)
    if call.operands:
        args, kwargs = _with_operands(call, args, kwargs, axis)
    if call.sizes:
        args = _with_sizes(call, args, rank)
    if call.pieces:
        dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
        return torch.split(args[0], list(call.pieces[rank]), dim)
    if call.items:
        args = (args[0], _with_item(args[0], args[1], call.items[rank]))
    if call.groups and len(args) > 6:
        args = (*args[:6], call.groups[rank], *args[7:])
    elif call.groups:
        kwargs = {**kwargs, "groups": call.groups[rank]}
    if call.leave:
        bias = None
        if func is torch.nn.functional.linear or call.name in CONVOLUTIONS:
            bias = kwargs.pop("bias", None) if "bias" in kwargs else (args[2] if len(args) > 2 else None)
            args = args if len(args) < 3 else (*args[:2], None, *args[3:])
            if bias is not None and call.name in CONVOLUTIONS:
                weight = kwargs["weight"] if "weight" in kwargs else args[1]
                bias = bias.view(-1, *[1] * (weight.ndim - 2))  # beside the channels
        elif call.name in WITH_BIAS and len(args) == 3:  # input + product
            bias, *args = args  # type: ignore[assignment]
            bias = bias if kwargs.get("beta", 1) == 1 else bias * kwargs["beta"]
            args, func = (args[0] * kwargs.get("alpha", 1), args[1]), WITH_BIAS[call.name]
            kwargs = {}
        leave = transition(P, call.to)
        out = func(*args, **kwargs)
        if leave is not None:
            out = leave(out, axis)
        elif bias is not None and rank:
            bias = bias * 0  # once among the terms; on all ranks it has a gradient
        return out if bias is None else out + bias
    out = func(*args, **kwargs)
    if call.logits is not None:
        from lightning_tp.core.ops.logits_rules import split_logits

        return split_logits(out, axis, call.logits)
    return out


def _whole_read(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], axis: Axis) -> Any:
    """The size that the code would read from the whole tensor."""
    sizes = list(args[0].size())
    for at, num, den in call.sizes[axis.rank] if call.sizes else ():
        if den == -1:
            sizes[at] = full_length(args[0], axis)
        else:
            sizes[at] = sizes[at] * num // den if den else num
    if call.name in COUNTS:
        return sizes[0] if call.name == "__len__" else math.prod(sizes)
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return torch.Size(sizes) if dim is None or call.name != "size" else sizes[dim]


def _with_operands(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], axis: Axis) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = args
    args, kwargs = (
        tuple(list(a) if isinstance(a, (list, tuple)) and not isinstance(a, torch.Size) else a for a in args),
        dict(kwargs),
    )
    new = list(args)
    for operand in call.operands:
        holder = _holder(operand.path, new, kwargs)
        x = holder[operand.path[-1]]
        if operand.enter and x.requires_grad:
            x = invariant_to_replicate(x, axis)
        if operand.part is not None and not _made_local(x, operand, new, kwargs):
            x = part_of(x, operand.part, axis.rank)
        holder[operand.path[-1]] = x
    return tuple(tuple(n) if isinstance(a, tuple) else n for n, a in zip(new, given, strict=True)), kwargs


def _holder(path: tuple[int | str, ...], args: list[Any], kwargs: dict[str, Any]) -> Any:
    """What the last step of a path looks into."""
    holder: Any = args if isinstance(path[0], int) else kwargs
    for step in path[:-1]:
        holder = holder[step]
    return holder


def _made_local(x: Tensor, operand: Operand, args: list[Any], kwargs: dict[str, Any]) -> bool:
    """Whether it has the size of the shard beside it already."""
    if operand.beside is None or operand.part is None:
        return False
    other = _holder(operand.beside, args, kwargs)[operand.beside[-1]]
    from_last = operand.part[0]
    return bool(x.ndim >= from_last and x.shape[-from_last] == other.shape[-from_last])


def part_of(x: Tensor, part: tuple[int, Ownership], rank: int) -> Tensor:
    """This rank's part of an operand that every rank has whole."""
    from_last, pattern = part
    dim = x.ndim - from_last
    if dim < 0 or x.shape[dim] == 1:
        return x
    ranges = pattern.ranges(rank)
    if x.shape[dim] == pattern.period and len(ranges) == 1:
        return x.narrow(dim, ranges[0][0], ranges[0][1] - ranges[0][0])
    if x.shape[dim] % pattern.period:
        raise TPError(
            f"An operand of shape {tuple(x.shape)}, of which this rank takes its part along dim {dim}: {x.shape[dim]} is no multiple of "
            f"{pattern.period}, as it was when the plan was made. Make the plan from inputs like these."
        )
    return x.index_select(dim, _index(pattern, rank, x.shape[dim], x.device))


@lru_cache(maxsize=256)
def _index(pattern: Ownership, rank: int, length: int, device: torch.device) -> Tensor:
    return pattern.index(rank, length).to(device)


def _with_sizes(call: Call, args: tuple[Any, ...], rank: int) -> tuple[Any, ...]:
    first = FIRST_SIZE.get(call.name, 1)
    packed = len(args) == first + 1 and isinstance(args[first], (tuple, list, torch.Size))
    sizes = list(args[first] if packed else args[first:])
    for at, num, den in call.sizes[rank]:
        if den == 0:
            sizes[at] = num
            continue
        if sizes[at] * num % den:
            raise TPError(
                f"`{call.name}{tuple(sizes)}`: size {sizes[at]} at {at} is not a multiple of {den}, as it was when the plan was made. Make the "
                "plan from inputs like these."
            )
        sizes[at] = sizes[at] * num // den
    return (*args[:first], tuple(sizes))


def _with_item(x: Tensor, item: Any, change: tuple[int, ...]) -> Any:
    position, start, stop, step, *length = change
    items = item if isinstance(item, tuple) else (item,)
    dim = dim_of_item(items, position, x.ndim)
    if length and dim is not None and x.shape[dim] != length[0]:
        raise TPError(
            f"A slice of a dim of {x.shape[dim]} on this rank, which had {length[0]} when the plan was made. Make the plan from inputs of as "
            "many sequences as these, or keep the weights of this module whole (`Rule(name, 'replicate')`)."
        )
    new = (*items[:position], slice(start, stop, step), *items[position + 1 :])
    return new if isinstance(item, tuple) else new[0]


def dim_of_item(items: Sequence[Any], position: int, ndim: int) -> int | None:
    """The dim that one part of an index `x[items]` is about; None for one that makes a dim, or for an ellipsis.

    Example:
        >>> dim_of_item((..., None, slice(0, 2)), 2, ndim=4)
        3
    """
    if items[position] is None or items[position] is Ellipsis:
        return None
    counts = [0 if i is None or i is Ellipsis else i.ndim if isinstance(i, Tensor) and i.dtype == torch.bool else 1 for i in items]
    rest = ndim - sum(counts) if any(i is Ellipsis for i in items[:position]) else 0
    return sum(counts[:position]) + rest
