"""Styles of `torch.distributed.tensor.parallel`, read as ours: a plan written for `parallelize_module` works as it stands."""

from __future__ import annotations

from typing import Any

from lightning_tp.core.comm.state import SEQUENCE, WIDTH, I, P, R, State
from lightning_tp.errors import TPError
from lightning_tp.styles.base import Style
from lightning_tp.styles.boundary import PrepareInput, PrepareOutput
from lightning_tp.styles.linear import Colwise, Rowwise
from lightning_tp.styles.replicated import Sequence
from lightning_tp.styles.vocab import VocabHead


def is_torch_style(value: Any) -> bool:
    """Whether this is one of torch's."""
    from torch.distributed.tensor.parallel import ParallelStyle

    return isinstance(value, ParallelStyle)


def from_torch(style: Any, where: str) -> tuple[Style, ...]:
    """The same as one or more of our styles.

    Raises:
        TPError: for a style, or for placements, that have no counterpart here.

    Example:
        >>> from torch.distributed.tensor import Shard
        >>> from torch.distributed.tensor.parallel import RowwiseParallel
        >>> [str(style) for style in from_torch(RowwiseParallel(output_layouts=Shard(1)), "layers.*.wo")]
        ['rowwise(output=S(1))']
    """
    from torch.distributed.tensor import parallel as torch_tp

    if isinstance(style, torch_tp.ColwiseParallel):
        arrives, leaves = _state(style.input_layouts[0], where), _state(style.output_layouts[0], where)
        given = None if arrives == I else arrives  # torch's default says nothing: the plan knows
        if leaves == WIDTH and not style.use_local_output:
            return (VocabHead(input=given),)  # logits that stay split for the loss
        return (Colwise(input=given, output=leaves),)
    if isinstance(style, torch_tp.RowwiseParallel):
        return (Rowwise(input=_state(style.input_layouts[0], where), output=_state(style.output_layouts[0], where)),)
    if isinstance(style, torch_tp.SequenceParallel):
        if style.sequence_sharding[0].dim != 1:
            raise TPError(f"`{where}`: {type(style).__name__}(sequence_dim={style.sequence_sharding[0].dim}): only dim 1 is cut.")
        return (Sequence(),)
    if isinstance(style, torch_tp.PrepareModuleInput):
        pairs: list[tuple[int | str, Any, Any]] = [
            (i, a, w) for i, (a, w) in enumerate(zip(style.input_layouts or (), style.desired_input_layouts or (), strict=True))
        ]
        pairs += [(k, a, style.desired_input_kwarg_layouts[k]) for k, a in style.input_kwarg_layouts.items()]
        return tuple(
            PrepareInput(arrives=_state(a, where), wanted=_wanted(w, where), arg=k)
            for k, a, w in pairs
            if a is not None and w is not None
        )
    if isinstance(style, torch_tp.PrepareModuleOutput):
        pairs_out = enumerate(zip(style.output_layouts, style.desired_output_layouts, strict=True))
        return tuple(
            PrepareOutput(arrives=_state(a, where), wanted=_state(w, where), index=i)
            for i, (a, w) in pairs_out
            if a is not None and w is not None
        )
    raise TPError(
        f"`{where}`: no counterpart for {type(style).__name__}. Known are ColwiseParallel, RowwiseParallel, SequenceParallel, "
        "PrepareModuleInput and PrepareModuleOutput; for another one, use `backend='dtensor'`."
    )


def _state(placement: Any, where: str) -> State:
    if placement.is_replicate():
        return I
    if placement.is_partial():
        return P
    if placement.is_shard(1):
        return SEQUENCE
    if placement.is_shard(-1) or placement.is_shard(2):
        return WIDTH
    raise TPError(f"`{where}`: {placement} is neither Replicate(), Shard(1) (the sequence), Shard(-1) (the width) nor Partial().")


def _wanted(placement: Any, where: str) -> State:
    state = _state(placement, where)
    return R if state == I else state  # what split layers read: gradients are partial
