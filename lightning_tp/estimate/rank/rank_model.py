"""Describe a model as one rank of a mesh holds it: its parameters, FSDP2's units, and the trace of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from lightning_tp.apply.fsdp import own_units
from lightning_tp.core.modules.blocks import enclosing, find_blocks
from lightning_tp.estimate.rank.settings import Precision, Settings
from lightning_tp.estimate.trace.step_trace import StepTrace
from lightning_tp.plan.checked import CheckedPlan
from lightning_tp.styles import Split


@dataclass(frozen=True)
class LocalParam:
    """A parameter on a rank."""

    name: str  # from the root module
    shape: tuple[int, ...]  # of the full parameter
    tp_shape: tuple[int, ...]  # of the shard on the tensor-parallel axis
    rows: int  # of dim 0 that FSDP2 leaves on this rank, with the padding of the last ranks
    split: Split  # how it is sharded on the tensor-parallel axis
    unit: str  # the FSDP2 unit that it belongs to; "" for the root's
    dtype: torch.dtype  # as held
    requires_grad: bool  # False for a frozen one

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape that this rank holds, padded as FSDP2 pads it."""
        return (self.rows, *self.tp_shape[1:]) if self.tp_shape else ()

    @property
    def numel(self) -> int:
        """The number of elements that this rank holds."""
        return math.prod(self.local_shape)

    @property
    def bytes(self) -> int:
        """The bytes that this rank holds."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class RankModel:
    """A model on one rank."""

    params: tuple[LocalParam, ...]  # its parameters, tied ones once
    buffer_bytes: int  # of all buffers
    trace: StepTrace  # of one micro-batch
    units: tuple[str, ...]  # names of FSDP2's units, the root's ("") last
    classes: Mapping[str, str]  # name of a module -> name of its class
    blocks: tuple[str, ...]  # names of the repeated blocks

    @cached_property
    def trained(self) -> list[LocalParam]:
        """The parameters that get a gradient; those of a block that did not run, if their counterparts got one."""
        copies, got = self.trace.copies, self.trace.gradients
        found = []
        for p in self.params:
            block = enclosing(p.unit or p.name, copies)
            if p.requires_grad and (p.name in got or (block and copies[block] + p.name[len(block) :] in got)):
                found.append(p)
        return found

    def with_data_parallel(self, dp: int) -> RankModel:
        """Return the same model on a mesh with another number of data-parallel ranks (both more than one)."""
        params = tuple(replace(p, rows=math.ceil(p.tp_shape[0] / dp) if p.tp_shape else 1) for p in self.params)
        return replace(self, params=params)


def local_params(model: nn.Module, plan: CheckedPlan, settings: Settings) -> tuple[LocalParam, ...]:
    """Return the parameters as a rank holds them, tied ones once."""
    blocks = find_blocks(model)
    units = {id(m) for m in own_units(model, [b for _, b in blocks])}
    unit_of = {id(p): name for name, b in blocks if id(b) in units for p in b.parameters()}
    splits, found = plan.splits, []
    for name, p in model.named_parameters():
        split = splits.get(name, Split())
        shape = tuple(p.shape)
        tp_shape = split.local_shape(shape, settings.rank)
        rows = (math.ceil(tp_shape[0] / settings.dp) if settings.dp > 1 else tp_shape[0]) if tp_shape else 1
        dtype = (settings.precision.held or p.dtype) if p.is_floating_point() else p.dtype
        found.append(LocalParam(name, shape, tp_shape, rows, split, unit_of.get(id(p), ""), dtype, p.requires_grad))
    return tuple(found)


@dataclass(frozen=True)
class Unit:
    """A unit of FSDP2 on a rank, in bytes."""

    gathered: int  # its all-gathered parameters (shards of the tensor-parallel axis), in the dtype in which modules read them
    reduced: int  # its gradients, in the dtype in which they are reduce-scattered
    gradients: int  # of its shard, as held after the reduce-scatter


def units_of(model: RankModel, precision: Precision, dp: int) -> dict[str, Unit]:
    """Return FSDP2's units by name; "" is the root's."""
    trained = {p.name for p in model.trained}
    found = {}
    for name in model.units:
        params = [p for p in model.params if p.unit == name]
        with_gradient = [p for p in params if p.name in trained]
        found[name] = Unit(
            sum(p.numel * dp * (precision.gathered or p.dtype).itemsize for p in params),
            sum(p.numel * dp * (precision.reduced or precision.gathered or p.dtype).itemsize for p in with_gradient),
            sum(p.bytes for p in with_gradient),
        )
    return found
