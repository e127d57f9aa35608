"""Change the state of an activation on the tensor-parallel axis: one conjugate pair of collectives per transition.

`transition(src, dst)` gives the one function that takes an activation from one state (see `state.py`) to another:

| src | dst | function | forward | backward |
|---|---|---|---|---|
| I | R | `invariant_to_replicate` | identity | all-reduce |
| P | I | `partial_to_invariant` | all-reduce | identity |
| S(1) | R | `sequence_to_replicate` | all-gather | reduce-scatter |
| P | S(1) | `partial_to_sequence` | reduce-scatter | all-gather |
| I | S(1) | `invariant_to_sequence` | slice | all-gather |
| S(1) | I | `sequence_to_invariant` | all-gather | slice |
| S(-1) | I | `width_to_invariant` (given the full width) | all-gather | slice |
| I | S(-1) | `invariant_to_width` | slice | all-gather |

The first two are the operators f and g of Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053), the next two their sequence-parallel pair
(Korthikanti et al. 2022, arXiv 2205.05198). Gradients of *parameters* are not handled here but in `shards/gradients.py`; a backward pass
that comes through here notifies it through `Axis.on_backward`. Second derivatives raise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from lightning_tp._compat import apply_of
from lightning_tp.core.comm.axis import SEQUENCE_DIM, Axis
from lightning_tp.core.comm.collectives import all_gather, all_reduce, reduce_scatter, shard_of, width_shard_of
from lightning_tp.core.comm.sequence import full_length, note_sharded
from lightning_tp.core.comm.state import SEQUENCE, WIDTH, I, P, R, State
from lightning_tp.errors import TPError

Transition = Callable[[Tensor, Axis], Tensor]


def _begin_backward(axis: Axis) -> None:
    """Notify whoever sums the gradients of parameters; called by every collective of a backward pass."""
    if torch.is_grad_enabled():  # as torch's once_differentiable, at a fraction of its cost
        raise RuntimeError(
            "The backward pass is being recorded (`create_graph=True`), but the collectives of a split model are once_differentiable: "
            "they have no second derivative."
        )
    if axis.on_backward is not None:
        axis.on_backward()


class _InvariantToReplicate(Function):
    """Any shape; f of Megatron-LM."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _begin_backward(ctx.axis)
        return all_reduce(grad.clone(memory_format=torch.contiguous_format), ctx.axis), None


class _PartialToInvariant(Function):
    """Any shape; g of Megatron-LM."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        if axis.sum is not None:
            return axis.sum(x, False)
        return all_reduce(x.clone(memory_format=torch.contiguous_format), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _begin_backward(ctx.axis)
        return grad, None


class _SequenceToReplicate(Function):
    """(B, ceil(S / tp), ..) -> (B, S, ..)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, SEQUENCE_DIM, full_length(x, axis), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _begin_backward(ctx.axis)
        return reduce_scatter(grad, SEQUENCE_DIM, ctx.axis), None


class _PartialToSequence(Function):
    """(B, S, ..) -> (B, ceil(S / tp), ..)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        ctx.sharded_length = note_sharded(x, axis)
        if axis.sum is not None:
            return axis.sum(x, True)
        return reduce_scatter(x, SEQUENCE_DIM, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _begin_backward(ctx.axis)
        return all_gather(grad, SEQUENCE_DIM, ctx.sharded_length, ctx.axis), None


class _InvariantToSequence(Function):
    """(B, S, ..) -> (B, ceil(S / tp), ..)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        ctx.sharded_length = note_sharded(x, axis)
        return shard_of(x, SEQUENCE_DIM, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _begin_backward(ctx.axis)
        return all_gather(grad, SEQUENCE_DIM, ctx.sharded_length, ctx.axis), None


class _SequenceToInvariant(Function):
    """(B, ceil(S / tp), ..) -> (B, S, ..)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, SEQUENCE_DIM, full_length(x, axis), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _begin_backward(ctx.axis)
        return shard_of(grad, SEQUENCE_DIM, ctx.axis), None


class _WidthToInvariant(Function):
    """(.., this rank's columns) -> (.., width)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, width: int) -> Tensor:
        ctx.axis = axis
        return _gather_width(x, width, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        _begin_backward(ctx.axis)
        return width_shard_of(grad, ctx.axis), None, None


class _InvariantToWidth(Function):
    """(.., width) -> (.., this rank's columns)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.width = axis, x.shape[-1]
        return width_shard_of(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _begin_backward(ctx.axis)
        return _gather_width(grad, ctx.width, ctx.axis), None


def _gather_width(x: Tensor, width: int, axis: Axis) -> Tensor:
    shard = math.ceil(width / axis.size)
    if x.shape[-1] != shard:  # the last ranks of an uneven split hold less
        x = torch.cat((x, x.new_zeros((*x.shape[:-1], shard - x.shape[-1]))), -1)
    return all_gather(x, x.ndim - 1, width, axis)


graph_breaks = 0  # how often compiled code was left: what has run once must not run again if the compiler fails further on


@torch.compiler.disable
def outside(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `function(*args, **kwargs)`, in compiled code between two graphs.

    Collectives so stay in the order of the program, which is the same on all ranks.

    Example:
        >>> outside(max, 1, 2)
        2
    """
    global graph_breaks
    graph_breaks += 1
    return function(*args, **kwargs)


def _transition_of(name: str, function: type[Function]) -> Any:
    """Make the function that callers use; in compiled code it runs between two graphs."""
    apply = apply_of(function)

    def change_state(x: Tensor, axis: Axis, *args: Any) -> Tensor:
        if is_compiling():
            return outside(apply, x, axis, *args)
        return apply(x, axis, *args)

    change_state.__doc__ = function.__doc__
    change_state.__name__ = change_state.__qualname__ = name
    return change_state


invariant_to_replicate = _transition_of("invariant_to_replicate", _InvariantToReplicate)
partial_to_invariant = _transition_of("partial_to_invariant", _PartialToInvariant)
sequence_to_replicate = _transition_of("sequence_to_replicate", _SequenceToReplicate)
partial_to_sequence = _transition_of("partial_to_sequence", _PartialToSequence)
invariant_to_sequence = _transition_of("invariant_to_sequence", _InvariantToSequence)
sequence_to_invariant = _transition_of("sequence_to_invariant", _SequenceToInvariant)
width_to_invariant = _transition_of(
    "width_to_invariant", _WidthToInvariant
)  # has to be told the full width: it is not in the table below
invariant_to_width = _transition_of("invariant_to_width", _InvariantToWidth)

_TRANSITIONS: dict[tuple[State, State], Transition] = {
    (I, R): invariant_to_replicate,
    (P, I): partial_to_invariant,
    (SEQUENCE, R): sequence_to_replicate,
    (P, SEQUENCE): partial_to_sequence,
    (I, SEQUENCE): invariant_to_sequence,
    (SEQUENCE, I): sequence_to_invariant,
    (I, WIDTH): invariant_to_width,
}


def transition(src: State, dst: State) -> Transition | None:
    """Return the function (x, axis) -> x that takes an activation from state `src` to `dst`; None where nothing has to happen.

    Raises:
        TPError: where no single collective does it.

    Example:
        >>> transition(SEQUENCE, R).__name__
        'sequence_to_replicate'
    """
    if src == dst:
        return None
    try:
        return _TRANSITIONS[src, dst]
    except KeyError:
        pairs = ", ".join(f"{a} -> {b}" for a, b in _TRANSITIONS)
        raise TPError(f"No transition takes an activation from {src} to {dst}. There are {pairs}. Go through I.") from None
