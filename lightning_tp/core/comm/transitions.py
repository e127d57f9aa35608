"""Change the state of an activation on the tensor-parallel axis: one conjugate pair of collectives per transition.

`transition(src, dst)` gives the one function that takes an activation from one state (see `state.py`) to another:

| src | dst | function | forward | backward |
|---|---|---|---|---|
| I | R | `invariant_to_replicate` | identity | all-reduce |
| R | I | `replicate_to_invariant` | identity | the gradient on one rank, zero on others |
| P | I | `partial_to_invariant` | all-reduce | identity |
| S(1) | R | `sequence_to_replicate` | all-gather | reduce-scatter |
| P | S(1) | `partial_to_sequence` | reduce-scatter | all-gather |
| I | S(1) | `invariant_to_sequence` | slice | all-gather |
| S(1) | I | `sequence_to_invariant` | all-gather | slice |
| S(-1) | I | `width_to_invariant` (given the full width) | all-gather | slice |
| I | S(-1) | `invariant_to_width` | slice | all-gather |

The first and the third are the operators f and g of Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053), the two after them their sequence-parallel
pair (Korthikanti et al. 2022, arXiv 2205.05198). Gradients of *parameters* are not handled here but in `shards/gradients.py`; a backward pass that
comes through here notifies it through `Axis.on_backward`. A backward pass that is recorded (`create_graph=True`) can be gone through again: the
conjugate of a pair is the pair the other way round.
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
    if axis.on_backward is not None:
        axis.on_backward()


# A forward gets (ctx, x), a backward (ctx, gradient), and keeps in `ctx` what its pair needs.


def _identity(ctx: Any, x: Tensor) -> Tensor:
    return x.view_as(x)


def _sum(ctx: Any, x: Tensor) -> Tensor:
    return all_reduce(x.clone(memory_format=torch.contiguous_format), ctx.axis)


def _on_first_rank(ctx: Any, grad: Tensor) -> Tensor:
    return torch.zeros_like(grad) if ctx.axis.rank else grad


def _sum_of_terms(ctx: Any, x: Tensor) -> Tensor:
    return _sum(ctx, x) if ctx.axis.sum is None else ctx.axis.sum(x, False)


def _gather_sequence(ctx: Any, x: Tensor) -> Tensor:
    """(B, ceil(S / tp), ..) -> (B, S, ..)."""
    ctx.gathered_length = full_length(x, ctx.axis)
    return all_gather(x, SEQUENCE_DIM, ctx.gathered_length, ctx.axis)


def _gather_sequence_again(ctx: Any, x: Tensor) -> Tensor:
    return all_gather(x, SEQUENCE_DIM, ctx.gathered_length, ctx.axis)


def _gather_sequence_gradient(ctx: Any, grad: Tensor) -> Tensor:
    return all_gather(grad, SEQUENCE_DIM, ctx.sharded_length, ctx.axis)


def _scatter_sum(ctx: Any, x: Tensor) -> Tensor:
    """(B, S, ..) -> (B, ceil(S / tp), ..)."""
    ctx.sharded_length = note_sharded(x, ctx.axis)
    return reduce_scatter(x, SEQUENCE_DIM, ctx.axis) if ctx.axis.sum is None else ctx.axis.sum(x, True)


def _scatter_sum_gradient(ctx: Any, grad: Tensor) -> Tensor:
    return reduce_scatter(grad, SEQUENCE_DIM, ctx.axis)


def _slice_sequence(ctx: Any, x: Tensor) -> Tensor:
    """(B, S, ..) -> (B, ceil(S / tp), ..)."""
    ctx.sharded_length = note_sharded(x, ctx.axis)
    return shard_of(x, SEQUENCE_DIM, ctx.axis)


def _slice_sequence_gradient(ctx: Any, grad: Tensor) -> Tensor:
    return shard_of(grad, SEQUENCE_DIM, ctx.axis)


def _gather_width(ctx: Any, x: Tensor, width: int | None = None) -> Tensor:
    """(.., this rank's columns) -> (.., width); a gradient has the width of what was sharded."""
    ctx.width = width = ctx.width if width is None else width
    shard = math.ceil(width / ctx.axis.size)
    if x.shape[-1] != shard:  # the last ranks of an uneven split hold less
        x = torch.cat((x, x.new_zeros((*x.shape[:-1], shard - x.shape[-1]))), -1)
    return all_gather(x, x.ndim - 1, width, ctx.axis)


def _slice_width(ctx: Any, x: Tensor) -> Tensor:
    """(.., width) -> (.., this rank's columns)."""
    ctx.width = x.shape[-1]
    return width_shard_of(x, ctx.axis)


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


class _Recorded(Function):
    """A backward of a pair as a function that has a backward itself, which is the pair's forward."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, pair: Any, backward: Callable[..., Tensor], again: Callable[..., Tensor]) -> Tensor:
        ctx.of = pair, backward, again
        return backward(pair, grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pair, backward, again = ctx.of
        _begin_backward(pair.axis)
        return _Recorded.apply(grad, pair, again, backward), None, None, None


def _pair(
    name: str, forward: Callable[..., Tensor], backward: Callable[[Any, Tensor], Tensor], again: Callable[[Any, Tensor], Tensor]
) -> Any:
    """Make the function (x, axis) -> x of a conjugate pair; in compiled code it runs between two graphs.

    `again` is `forward` for the gradient of a gradient.
    """

    def run_forward(ctx: Any, x: Tensor, axis: Axis, *args: Any) -> Tensor:
        ctx.axis = axis
        return forward(ctx, x, *args)

    def run_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _begin_backward(ctx.axis)
        found = _Recorded.apply(grad, ctx, backward, again) if torch.is_grad_enabled() else backward(ctx, grad)
        return found, *[None] * (len(ctx.needs_input_grad) - 1)

    apply = apply_of(type(name, (Function,), {"forward": staticmethod(run_forward), "backward": staticmethod(run_backward)}))

    def change_state(x: Tensor, axis: Axis, *args: Any) -> Tensor:
        if not is_compiling() and hasattr(type(x), "as_state"):  # a stream's shard that shows as full
            x = x.as_state(SEQUENCE if name.startswith("sequence") else I)  # type: ignore[attr-defined]
        return outside(apply, x, axis, *args) if is_compiling() else apply(x, axis, *args)

    change_state.__name__ = change_state.__qualname__ = name
    return change_state


invariant_to_replicate = _pair("invariant_to_replicate", _identity, _sum, _identity)
replicate_to_invariant = _pair("replicate_to_invariant", _identity, _on_first_rank, _on_first_rank)
partial_to_invariant = _pair("partial_to_invariant", _sum_of_terms, _identity, _sum)
sequence_to_replicate = _pair("sequence_to_replicate", _gather_sequence, _scatter_sum_gradient, _gather_sequence_again)
partial_to_sequence = _pair("partial_to_sequence", _scatter_sum, _gather_sequence_gradient, _scatter_sum_gradient)
invariant_to_sequence = _pair("invariant_to_sequence", _slice_sequence, _gather_sequence_gradient, _slice_sequence_gradient)
sequence_to_invariant = _pair("sequence_to_invariant", _gather_sequence, _slice_sequence_gradient, _gather_sequence_again)
width_to_invariant = _pair("width_to_invariant", _gather_width, _slice_width, _gather_width)  # has to be told the width: not below
invariant_to_width = _pair("invariant_to_width", _slice_width, _gather_width, _slice_width)

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
