"""What crosses the ranks of the tensor-parallel axis: one conjugate pair of collectives per transition.

An activation is in one of five states on the axis (of `tp` ranks):

| state | a rank holds | its gradient is |
|---|---|---|
| `replicate` | the whole tensor | the whole gradient, equal on all ranks |
| `gathered` | the whole tensor | a partial sum: the shares of all ranks add up |
| `sequence` | its shard of the tokens (dim 1, padded to equal shards) | the same shard |
| `width` | its shard of the last dim | the same shard |
| `partial` | a term of a sum over ranks | the whole gradient, equal on all ranks |

and `transition(arrives, wanted)` gives the one function that takes it from one to the next:

| arrives | wanted | forward | backward |
|---|---|---|---|
| replicate | gathered | nothing | all-reduce |
| sequence | gathered | all-gather | reduce-scatter |
| partial | replicate | all-reduce | nothing |
| partial | sequence | reduce-scatter | all-gather |
| replicate | sequence | slice | all-gather |
| sequence | replicate | all-gather | slice |
| width | replicate | all-gather | slice |
| replicate | width | slice | all-gather |

The first four are the operators f, g and their sequence-parallel pair of Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053;
Korthikanti et al. 2022, arXiv 2205.05198). Collectives are called on the process group itself: the wrappers of
`torch.distributed` cost as much as the small collectives they wrap. Gradients of *parameters* are not handled here but in
`grad.py`; a backward pass that comes through here tells it so through `Axis.on_backward`. Second derivatives raise.
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
from lightning_tp.core.comm.collectives import _columns, all_gather, all_reduce, cut, reduce_scatter
from lightning_tp.errors import TPError


def _backward_began(axis: Axis) -> None:
    if torch.is_grad_enabled():  # as torch's once_differentiable, at a fraction of its cost
        raise RuntimeError(
            "The backward pass is being recorded (`create_graph=True`), but the collectives of a split model are once_differentiable: "
            "they have no second derivative."
        )
    if axis.on_backward is not None:
        axis.on_backward()


class _ReplicateToGathered(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _backward_began(ctx.axis)
        return all_reduce(grad.clone(memory_format=torch.contiguous_format), ctx.axis), None


class _PartialToReplicate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        if axis.sum is not None:
            return axis.sum(x, False)
        return all_reduce(x.clone(memory_format=torch.contiguous_format), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _backward_began(ctx.axis)
        return grad, None


class _SequenceToGathered(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, SEQUENCE_DIM, length_of(x, axis), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _backward_began(ctx.axis)
        return reduce_scatter(grad, SEQUENCE_DIM, ctx.axis), None


class _PartialToSequence(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        ctx.seq_len = _cut_sequence(x, axis)
        if axis.sum is not None:
            return axis.sum(x, True)
        return reduce_scatter(x, SEQUENCE_DIM, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _backward_began(ctx.axis)
        return all_gather(grad, SEQUENCE_DIM, ctx.seq_len, ctx.axis), None


class _ReplicateToSequence(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        ctx.seq_len = _cut_sequence(x, axis)
        return cut(x, SEQUENCE_DIM, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _backward_began(ctx.axis)
        return all_gather(grad, SEQUENCE_DIM, ctx.seq_len, ctx.axis), None


class _SequenceToReplicate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, SEQUENCE_DIM, length_of(x, axis), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _backward_began(ctx.axis)
        return cut(grad, SEQUENCE_DIM, ctx.axis), None


class _WidthToReplicate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, width: int) -> Tensor:
        ctx.axis = axis
        shard = math.ceil(width / axis.size)
        if x.shape[-1] != shard:  # the last ranks of an uneven split hold less
            x = torch.cat((x, x.new_zeros((*x.shape[:-1], shard - x.shape[-1]))), -1)
        return all_gather(x, x.ndim - 1, width, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        _backward_began(ctx.axis)
        return _columns(grad, ctx.axis), None, None


class _ReplicateToWidth(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.width = axis, x.shape[-1]
        return _columns(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _backward_began(ctx.axis)
        shard = math.ceil(ctx.width / ctx.axis.size)
        if grad.shape[-1] != shard:
            grad = torch.cat((grad, grad.new_zeros((*grad.shape[:-1], shard - grad.shape[-1]))), -1)
        return all_gather(grad, grad.ndim - 1, ctx.width, ctx.axis), None


left_compiled_code = 0  # how often: what has run once must not run again, if a compiler fails further on


@torch.compiler.disable
def outside(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args)`; where code is compiled, between two pieces of it, as if it were not.

    Collectives stay in the order of the program, which is the same on all ranks.

    Example:
        >>> outside(max, 1, 2)
        2
    """
    global left_compiled_code
    left_compiled_code += 1
    return function(*args, **kwargs)


_replicate_to_gathered = apply_of(_ReplicateToGathered)


_partial_to_replicate = apply_of(_PartialToReplicate)


_sequence_to_gathered = apply_of(_SequenceToGathered)


_partial_to_sequence = apply_of(_PartialToSequence)


def replicate_to_gathered(x: Tensor, axis: Axis) -> Tensor:
    """Nothing; backward all-reduce (f of Megatron-LM). `x` of any shape."""
    if is_compiling():
        return outside(_replicate_to_gathered, x, axis)
    return _replicate_to_gathered(x, axis)


def partial_to_replicate(x: Tensor, axis: Axis) -> Tensor:
    """All-reduce; backward nothing (g of Megatron-LM). `x` of any shape."""
    if is_compiling():
        return outside(_partial_to_replicate, x, axis)
    return _partial_to_replicate(x, axis)


def sequence_to_gathered(x: Tensor, axis: Axis) -> Tensor:
    """(B, ceil(S / tp), ..) -> (B, S, ..): all-gather; backward reduce-scatter."""
    if is_compiling():
        return outside(_sequence_to_gathered, x, axis)
    return _sequence_to_gathered(x, axis)


def partial_to_sequence(x: Tensor, axis: Axis) -> Tensor:
    """(B, S, ..) -> (B, ceil(S / tp), ..): reduce-scatter; backward all-gather."""
    if is_compiling():
        return outside(_partial_to_sequence, x, axis)
    return _partial_to_sequence(x, axis)


def replicate_to_sequence(x: Tensor, axis: Axis) -> Tensor:
    """(B, S, ..) -> (B, ceil(S / tp), ..): slice; backward all-gather."""
    if is_compiling():
        return outside(_ReplicateToSequence.apply, x, axis)
    return _ReplicateToSequence.apply(x, axis)


def sequence_to_replicate(x: Tensor, axis: Axis) -> Tensor:
    """(B, ceil(S / tp), ..) -> (B, S, ..): all-gather; backward slice."""
    if is_compiling():
        return outside(_SequenceToReplicate.apply, x, axis)
    return _SequenceToReplicate.apply(x, axis)


def width_to_replicate(x: Tensor, axis: Axis, width: int) -> Tensor:
    """(.., this rank's columns) -> (.., width): all-gather; backward slice."""
    if is_compiling():
        return outside(_WidthToReplicate.apply, x, axis, width)
    return _WidthToReplicate.apply(x, axis, width)


def replicate_to_width(x: Tensor, axis: Axis) -> Tensor:
    """(.., width) -> (.., this rank's columns): slice; backward all-gather."""
    if is_compiling():
        return outside(_ReplicateToWidth.apply, x, axis)
    return _ReplicateToWidth.apply(x, axis)


Transition = Callable[[Tensor, Axis], Tensor]


_TRANSITIONS: dict[tuple[str, str], Transition] = {
    ("replicate", "gathered"): replicate_to_gathered,
    ("partial", "replicate"): partial_to_replicate,
    ("sequence", "gathered"): sequence_to_gathered,
    ("partial", "sequence"): partial_to_sequence,
    ("replicate", "sequence"): replicate_to_sequence,
    ("sequence", "replicate"): sequence_to_replicate,
    ("replicate", "width"): replicate_to_width,
}


def transition(arrives: str, wanted: str) -> Transition | None:
    """The function (x, axis) -> x that takes an activation from one state to another; None where nothing has to happen.

    Raises:
        TPError: where no single collective does it (say it in two steps: through `replicate`).

    Example:
        >>> transition("sequence", "gathered").__name__
        'sequence_to_gathered'
    """
    if arrives == wanted:
        return None
    try:
        return _TRANSITIONS[arrives, wanted]
    except KeyError:
        raise TPError(
            f"No transition takes an activation from {arrives!r} to {wanted!r}. There are: "
            + ", ".join(f"{a} -> {w}" for a, w in _TRANSITIONS)
            + ". Go through 'replicate'."
        ) from None


def _cut_sequence(x: Tensor, axis: Axis) -> int:
    before, axis.seq_len = axis.seq_len, x.shape[SEQUENCE_DIM]
    if before is not None and before != axis.seq_len and math.ceil(before / axis.size) == math.ceil(axis.seq_len / axis.size):
        axis.seq_len_changed = True
    return axis.seq_len


def length_of(shard: Tensor, axis: Axis) -> int:
    """The length that shards like this one add up to: their own where nothing was padded, else what was last cut."""
    seq_len, tokens = axis.seq_len, shard.shape[SEQUENCE_DIM]
    if seq_len is None or math.ceil(seq_len / axis.size) != tokens:
        raise TPError(
            f"A tensor of shape {tuple(shard.shape)} arrives where a shard of the sequence is expected, but the sequence that "
            f"was last cut over tp={axis.size} ranks has "
            + ("not been seen" if seq_len is None else f"{seq_len} tokens, {math.ceil(seq_len / axis.size)} a rank")
            + ". Something between the two changed or never cut the sequence (dim 1): give the module in between the style "
            "`replicate`, or turn sequence parallelism off (`sequence_parallel=False`)."
        )
    if axis.seq_len_changed and (own := _length_at_its_cut(shard)) not in (None, seq_len):
        raise TPError(
            f"A shard of a sequence of {own} tokens is wanted whole after another of {seq_len} tokens was cut over tp={axis.size} ranks "
            f"({tokens} a rank, both): an encoder's and a decoder's, say. One is in shards at a time: let the first leave its last module "
            "whole (`output='replicate'`), or turn sequence parallelism off (`sequence_parallel=False`)."
        )
    return seq_len


def _length_at_its_cut(shard: Tensor) -> int | None:
    """The length of what this shard was cut from, by the nearest cut in its graph; None without one (no gradient is recorded)."""
    nodes, seen = [shard.grad_fn], set()
    for node in nodes:  # grows: breadth first
        if isinstance(node, _CUTS):
            return node.seq_len
        for earlier, _ in () if node is None else node.next_functions:
            if earlier is not None and earlier not in seen:
                seen.add(earlier)
                nodes.append(earlier)
    return None


_CUTS: Any = (_PartialToSequence._backward_cls, _ReplicateToSequence._backward_cls)
