"""`parallelize`: apply a plan to a model, in place. The order of the steps and nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_tp._compat import initialize_fsdp
from lightning_tp.apply import materialize
from lightning_tp.apply.activation_checkpointing import (
    ActivationCheckpointing,
    check_activation_checkpointing,
    checkpoint_modules,
    modules_to_checkpoint,
)
from lightning_tp.apply.bind import ParamRegistry, bind_styles, split_parameters, sum_groups, tag_parameters
from lightning_tp.apply.compile import Compile, check_compile, compile_blocks, unwrap_compiled
from lightning_tp.apply.entry import enter_local_view
from lightning_tp.apply.fsdp import apply_fsdp
from lightning_tp.apply.same_everywhere import same_plan_everywhere, same_values_everywhere, same_weights_everywhere
from lightning_tp.apply.stream import mark_streams
from lightning_tp.apply.unsplit import Ways, remember_unsplit
from lightning_tp.checkpoint.weights.pretrained import read_shards, take_pending
from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.mesh import check_mesh
from lightning_tp.core.modules.blocks import find_blocks
from lightning_tp.core.ops.random_numbers import Dropout, bind_random_calls
from lightning_tp.errors import TPError
from lightning_tp.plan.check import refuse_distributed
from lightning_tp.plan.checked import CheckedPlan
from lightning_tp.plan.declared import declared_plan
from lightning_tp.plan.plan import Plan
from lightning_tp.shards.grad_norm import register_kinds
from lightning_tp.shards.gradients import PartialGradients
from lightning_tp.shards.state_dict import attach_state_dict
from lightning_tp.shards.view import local_view

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy

PlanLike = Plan | CheckedPlan | Mapping[str, Any] | str | Path


@dataclass(frozen=True)
class _Options:
    loss_parallel: bool
    activation_checkpointing: ActivationCheckpointing | None
    compile: Compile
    precision: MixedPrecisionPolicy | None
    dropout: Dropout
    device: torch.device | None
    fsdp_root: nn.Module | None


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    plan: PlanLike | None = None,
    *,
    sequence_parallel: bool = True,
    loss_parallel: bool = True,
    activation_checkpointing: ActivationCheckpointing | None = None,
    compile: Compile = False,
    precision: MixedPrecisionPolicy | None = None,
    dropout: Dropout = "independent",
    backend: Literal["local", "dtensor"] = "local",
    device: torch.device | None = None,
    fsdp_root: nn.Module | None = None,
) -> nn.Module:
    """Split `model` over the tensor-parallel axis of `mesh`, and shard it by FSDP2 over the data-parallel axis, in place.

    Every rank calls it with the same model, which is afterwards called as before; all ranks of a tensor-parallel group have to be given the
    same batch. Parameters are this rank's plain shards (under FSDP2 its DTensors), the state dict holds DTensors over the mesh.

    Args:
        model: on any device, or on the meta device (then its weights are initialized here, as in one process).
        mesh: 2D, with the axes ("data_parallel", "tensor_parallel").
        plan: a mapping pattern -> style, a `Plan`, or the path of its JSON. Default: the one that the model declares.
        sequence_parallel: False keeps activations in full between the split modules, whatever the plan says.
        loss_parallel: False all-gathers the logits of a `vocab_head`.
        activation_checkpointing: "block" saves the input of each repeated block and recomputes the rest; "selective" also saves what is
            expensive to compute (matmuls, attention, sums over ranks); a function (name, module) -> bool chooses what is recomputed.
        compile: True compiles each repeated block by `torch.compile`; also the name of a backend, or a function that is one.
        precision: FSDP2's policy; it acts where the data-parallel axis has more than one rank.
        dropout: "independent" draws another mask on each rank for a sharded activation; "exact" draws that of one process.
        backend: "local" computes on plain tensors; "dtensor" applies the same plan by `parallelize_module` of torch.
        device: where a model on the meta device goes. Default: the mesh's.
        fsdp_root: the module inside `model` that is called, if it isn't `model` itself.

    Raises:
        TPError: before anything is changed, for a plan that does not fit the model or differs between ranks, or a distributed model.

    Example:
        >>> from lightning_tp.testing import single_rank_mesh
        >>> with single_rank_mesh() as mesh:
        ...     model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
        ...     parallelize(model, mesh, {"0": "colwise", "1": "rowwise"})(torch.zeros(1, 2, 4)).shape
        torch.Size([1, 2, 4])
    """
    _, tp_mesh = check_mesh(mesh)
    check_options(activation_checkpointing, compile, dropout, backend)
    compile = unwrap_compiled(model) or compile
    checked = resolve_plan(model, plan, tp_mesh.size(), sequence_parallel=sequence_parallel)
    same_plan_everywhere(checked, mesh)
    options = _Options(loss_parallel, activation_checkpointing, compile, precision, dropout, device, fsdp_root)
    return (_by_torchs_styles if backend == "dtensor" else _locally)(model, mesh, checked, options)


@local_view()
def _locally(model: nn.Module, mesh: DeviceMesh, plan: CheckedPlan, options: _Options) -> nn.Module:
    """Split parameters and bind styles; then activation checkpointing, compile, FSDP2, weights: the order that torchtitan has."""
    dp_mesh, tp_mesh = check_mesh(mesh)
    if tp_mesh.size() > 1 and not plan.shards_anything and dist.get_rank() == 0:
        warnings.warn(plan.why_nothing_is_sharded(model), stacklevel=3)
    blocks = [block for _, block in find_blocks(model)]
    how = options.activation_checkpointing
    recomputed = modules_to_checkpoint(model, blocks, how) if how is not None else []
    stored = take_pending(model)
    full_values = materialize.initial_values(model, stored)
    same_weights_everywhere(model, mesh)
    model._tp_applied_plan = plan  # type: ignore[assignment]
    axis = Axis(tp_mesh.get_group())
    mode, remember = model.training, remember_unsplit(model)
    hooks = split_parameters(model, plan, mesh, fsdp=dp_mesh.size() > 1)
    if tp_mesh.size() > 1:
        bind_styles(model, plan, axis, loss_parallel=options.loss_parallel)
    if options.compile:
        compile_blocks(blocks, options.compile)
    if how is not None:
        checkpoint_modules(recomputed, axis, how)
    shards = {name: p._tp_shard for name, p in model.named_parameters()}  # type: ignore[attr-defined]
    if dp_mesh.size() > 1:
        apply_fsdp(options.fsdp_root or model, blocks, dp_mesh, precision=options.precision)
    if full_values is not None:
        device = options.device or torch.device(mesh.device_type)
        materialize.fill_shards(model, same_values_everywhere(full_values, mesh), shards, device)
    gradients = PartialGradients(axis, sum_groups(plan, mesh), hooks)
    registry = model._tp_registry = ParamRegistry(shards, gradients)  # type: ignore[assignment]
    tag_parameters(model)
    read_shards(model, stored)
    if tp_mesh.size() > 1:
        bind_random_calls(model, axis, options.dropout)
    if dp_mesh.size() > 1:
        registry.fsdp_root = options.fsdp_root or model
        initialize_fsdp(registry.fsdp_root)
    if tp_mesh.size() > 1 and not options.compile:
        mark_streams(model, plan, axis)
    if mesh.size() > 1:
        attach_state_dict(model)
        enter_local_view(model, partial(_ways, model, mesh, options), mode)
        remember()
    return model


def _ways(model: nn.Module, mesh: DeviceMesh, options: _Options, trusted: bool | None, strict: bool | None = None) -> Ways | None:
    if options.compile and strict is None:  # a model that is called as a whole: each comparison would compile it anew
        return None
    return Ways(model, mesh, trusted, strict=bool(strict))


def check_options(recompute: ActivationCheckpointing | None, compile: Compile, dropout: Dropout, backend: str) -> None:
    """Refuse options that don't go together, or don't exist.

    Raises:
        TPError: it says which.
    """
    if dropout not in ("independent", "exact") or (dropout == "exact" and backend == "dtensor"):
        raise TPError(f"`dropout={dropout!r}`: there is 'independent', and 'exact' with `backend='local'`.")
    check_activation_checkpointing(recompute)
    if backend == "dtensor" and (recompute is not None or compile):
        raise TPError(
            "`backend='dtensor'` has neither activation checkpointing nor `compile`. Use `backend='local'`, or leave them out."
        )
    if compile and recompute == "selective":
        raise TPError(
            "`compile` together with `activation_checkpointing='selective'`: selective checkpointing looks at each operator, and compiled code "
            "has none; a compiler decides by itself what is cheap enough to be computed again. Use 'block', or leave one of them out."
        )
    check_compile(compile)
    if compile and dropout == "exact":
        raise TPError("`compile` together with `dropout='exact'`, which looks into every step: leave one of them out.")


def resolve_plan(model: nn.Module, plan: PlanLike | None, tp: int, *, sequence_parallel: bool = True) -> CheckedPlan:
    """Return the checked plan for `model`: the one given, else the one that it declares.

    Raises:
        TPError: if there is neither, or it does not fit.
    """
    refuse_distributed(model)
    found = Plan.of(plan) if plan is not None else declared_plan(model, tp)
    if found is None and tp == 1:
        found = Plan({"**": "replicate"}, source="nothing to split over tp=1")
    if found is None:
        raise TPError(
            f"There is no plan for {type(model).__name__}: none was given, and it declares none (as Hugging Face models do by "
            "`base_model_tp_plan`). "
            + (
                f"It has repeated blocks ({', '.join(n for n, _ in find_blocks(model)[:3])}): say how their linear layers are split, "
                "`plan={'layers.*.attention.wq': 'colwise', 'layers.*.attention.wo': 'rowwise', .., '**': 'replicate'}`."
                if find_blocks(model)
                else "It has no repeated transformer blocks either; tensor parallelism is for transformers. Use tp=1, or a plan."
            )
        )
    if not sequence_parallel:
        found = found.without_sequence_parallel()
    return found.check(model, tp)


def _by_torchs_styles(model: nn.Module, mesh: DeviceMesh, plan: CheckedPlan, options: _Options) -> nn.Module:
    """Apply the same plan by PyTorch's own styles, with parameters as DTensors: the reference to compare with."""
    from torch.distributed.tensor.parallel import parallelize_module

    dp_mesh, tp_mesh = check_mesh(mesh)
    if materialize.initial_values(model, take_pending(model)) is not None:
        raise TPError("`backend='dtensor'`: a model on the meta device stays there. Build it on the CPU, or use `backend='local'`.")
    tied = sorted(plan.tied)
    if tied and any(plan.splits[n].dim is not None for n in tied if n in plan.splits):
        raise TPError(f"`backend='dtensor'`: PyTorch's styles silently untie `{tied[0]}`. Use `backend='local'`, or untie it.")
    same_weights_everywhere(model, mesh)
    register_kinds()
    model._tp_applied_plan = plan  # type: ignore[assignment]
    if tp_mesh.size() > 1:
        parallelize_module(model, tp_mesh, plan.to_torch(model))
    if dp_mesh.size() > 1:
        apply_fsdp(options.fsdp_root or model, [b for _, b in find_blocks(model)], dp_mesh, precision=options.precision)
    return model
