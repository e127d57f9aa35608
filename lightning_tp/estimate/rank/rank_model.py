"""A model as one rank of a mesh holds it: its parameters, FSDP2's units, and the trace of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from lightning_tp.apply.fsdp import own_units
from lightning_tp.core.modules.blocks import find_blocks
from lightning_tp.estimate.rank.settings import Settings
from lightning_tp.estimate.trace.step_trace import StepTrace
from lightning_tp.plan.plan import Plan
from lightning_tp.styles import Split


@dataclass(frozen=True)
class LocalParam:
    """A parameter on a rank.

    Args:
        name: from the root.
        shape: whole.
        tp_shape: after the tensor-parallel axis.
        rows: of dim 0 that FSDP2 leaves on this rank, the padding of the last ranks included.
        split: how it lies on the tensor-parallel axis.
        unit: FSDP2's that it belongs to, "" for the root's.
        dtype: as held.
        trained: whether it has a gradient.
    """

    name: str
    shape: tuple[int, ...]
    tp_shape: tuple[int, ...]
    rows: int
    split: Split
    unit: str
    dtype: torch.dtype
    trained: bool

    @property
    def local_shape(self) -> tuple[int, ...]:
        """What this rank holds, padded as FSDP2 pads it."""
        return (self.rows, *self.tp_shape[1:]) if self.tp_shape else ()

    @property
    def numel(self) -> int:
        """Elements that this rank holds."""
        return math.prod(self.local_shape)


@dataclass(frozen=True)
class RankModel:
    """What is known of one rank after the trace.

    Args:
        held: its parameters.
        buffers: their bytes.
        trace: of one micro-batch.
        units: FSDP2's, "" last.
        classes: of each module, by name.
        blocks: their names.
    """

    held: tuple[LocalParam, ...]
    buffers: int
    trace: StepTrace
    units: tuple[str, ...]
    classes: Mapping[str, str]
    blocks: tuple[str, ...]

    def over(self, dp: int) -> RankModel:
        """The same with another number of data-parallel ranks (both more than one)."""
        held = tuple(replace(h, rows=math.ceil(h.tp_shape[0] / dp) if h.tp_shape else 1) for h in self.held)
        return replace(self, held=held)


def held_by(model: nn.Module, plan: Plan, settings: Settings) -> tuple[LocalParam, ...]:
    """The parameters of the rank, the tied ones once."""
    blocks = find_blocks(model)
    units = {id(m) for m in own_units(model, [b for _, b in blocks])}
    unit_of = {id(p): name for name, b in blocks if id(b) in units for p in b.parameters()}
    splits, found = plan.splits, []
    for name, p in model.named_parameters():
        split = splits.get(name, Split())
        shape = tuple(p.shape)
        local = split.local_shape(shape, settings.rank)
        rows = (math.ceil(local[0] / settings.dp) if settings.dp > 1 else local[0]) if local else 1
        dtype = settings.precision.held or p.dtype
        found.append(
            LocalParam(
                name,
                shape,
                local,
                rows,
                split,
                unit_of.get(id(p), ""),
                dtype if p.is_floating_point() else p.dtype,
                p.requires_grad,
            )
        )
    return tuple(found)
