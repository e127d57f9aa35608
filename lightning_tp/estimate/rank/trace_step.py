"""Trace one micro-batch of a model as one rank runs it, on the meta device and without a process group.

The steps are those of `parallelize`: shards by the plan, styles, activation checkpointing. FSDP2 does not change what a module computes; its
buffers and collectives are added in `cost.memory` and `cost.collectives`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from lightning_tp._compat import backward_under_modes
from lightning_tp.apply.activation_checkpointing import checkpoint_modules, modules_to_checkpoint
from lightning_tp.apply.bind import bind_styles, replace_parameters
from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.fake_world import FakeGroup
from lightning_tp.core.modules.blocks import block_settings, enclosing, find_blocks
from lightning_tp.core.modules.snapshot import MetaWeights, gc_disabled, preserve_modules
from lightning_tp.errors import TPError
from lightning_tp.estimate.rank.inputs import LossOf
from lightning_tp.estimate.rank.rank_model import RankModel, local_params
from lightning_tp.estimate.rank.settings import Precision, Settings
from lightning_tp.estimate.trace.device_kernels import Kernels
from lightning_tp.estimate.trace.recorder import OpRecorder
from lightning_tp.estimate.trace.step_trace import StepTrace
from lightning_tp.plan.checked import CheckedPlan
from lightning_tp.styles import Split


def trace_step(model: nn.Module, loss_of: LossOf, inputs: Any, plan: CheckedPlan, settings: Settings) -> RankModel:
    """Trace a micro-batch of the model on a rank; the model is left as it was. `TPError` names the module if it can't be traced."""
    params = local_params(model, plan, settings)
    buffers = {id(b): b.numel() * b.itemsize for b in model.buffers()}
    units = (*dict.fromkeys(p.unit for p in params if p.unit), "")
    classes = {name: type(m).__name__ for name, m in model.named_modules()}
    blocks = tuple(name for name, _ in find_blocks(model))
    with MetaWeights(model), preserve_modules(model):
        kinds = block_kinds(model, plan)
        shard_on_meta(model, plan, settings)
        model.train()
        trace = _record(model, loss_of, inputs, plan, settings, kinds)
    return RankModel(params, sum(buffers.values()), trace, units, classes, blocks)


def _record(
    model: nn.Module, loss_of: LossOf, inputs: Any, plan: CheckedPlan, settings: Settings, kinds: Mapping[str, int]
) -> StepTrace:
    blocks = {name: model.get_submodule(name) for name in kinds}  # other shards may be alike where full modules aren't
    group = FakeGroup(settings.rank, settings.tp)
    axis = Axis(group)
    if settings.tp > 1:
        bind_styles(model, plan, axis, loss_parallel=settings.loss_parallel)
    how = settings.activation_checkpointing
    if how is not None:
        checkpoint_modules(modules_to_checkpoint(model, list(blocks.values()), how), axis, how)
    kernels = Kernels(settings.device, settings.precision.autocast, fused_attention=settings.fused_attention)
    recorder = OpRecorder(model, blocks, kinds, group, kernels)
    inputs = _converted(recorder.onto_meta(inputs), settings.precision)
    # without the garbage collector: what it frees, and when, is chance
    with gc_disabled(), _naming_the_module(model, recorder, settings), recorder.recording(tree_flatten(inputs)[0]), kernels:
        loss = loss_of(model, inputs)
        if not loss.requires_grad:
            raise TPError("The loss does not depend on any trainable parameter, so there is no backward pass to estimate.")
        recorder.begin_backward()
        backward_under_modes(loss)
        del loss
    return recorder.step_trace()


@contextmanager
def _naming_the_module(model: nn.Module, recorder: OpRecorder, settings: Settings) -> Iterator[None]:
    """Turn any exception of the step into a TPError that says in which module it was raised."""
    try:
        yield
    except TPError:
        raise
    except Exception as error:
        name = type(model).__name__
        module = recorder.failed or recorder.where[0] or name
        phase = "backward" if recorder.in_backward else "forward"
        raise TPError(
            f"{name} could not be traced on the meta device: `{module}` raised {type(error).__name__}: {' '.join(str(error).split())[:300]} "
            f"(in the {phase}, tp={settings.tp}). Check that it runs on these inputs, and that its code does not branch on the values of "
            "activations."
        ) from error


def _converted(inputs: Any, precision: Precision) -> Any:
    """Return the inputs in the dtype in which a Trainer hands them to the model."""
    dtype = precision.inputs
    return inputs if dtype is None else tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)


def shard_on_meta(model: nn.Module, plan: CheckedPlan, settings: Settings) -> None:
    """Replace each parameter by an empty one in the shape of the rank's shard and the dtype that modules compute in; tied ones stay tied."""
    precision = settings.precision
    dtype = (precision.gathered if settings.dp > 1 else None) or precision.held

    def make(name: str, p: nn.Parameter, split: Split) -> nn.Parameter:
        like = (dtype or p.dtype) if p.is_floating_point() else p.dtype
        shape = split.local_shape(tuple(p.shape), settings.rank)
        local = nn.Parameter(torch.empty(shape, dtype=like, device="meta"), p.requires_grad)
        local.__dict__.update(p.__dict__)
        return local

    replace_parameters(model, plan, make)
    if precision.buffers is not None:
        for module in model.modules():
            for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
                if buffer.is_floating_point():
                    setattr(module, name, buffer.to(precision.buffers))


def block_kinds(model: nn.Module, plan: CheckedPlan) -> dict[str, int]:
    """Return a number for each block, equal for blocks that do the same: with the same classes, shapes, settings and styles."""
    settings = block_settings(dict(find_blocks(model)))
    styles: dict[str, list[tuple[str, str]]] = {name: [] for name in settings}
    for entry in plan.entries:
        if where := enclosing(entry.where, settings):
            styles[where].append((entry.where[len(where) :], repr(entry.style)))
    return {name: hash((of_block, *sorted(styles[name]))) for name, of_block in settings.items()}
