"""Cut every parameter of a model to this rank's shard and bind the styles of a plan to its modules."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.mesh import TENSOR_PARALLEL
from lightning_tp.plan.plan import Plan
from lightning_tp.shards import grad_norm, shard
from lightning_tp.shards import gradients as grad
from lightning_tp.styles import BindContext


def split_parameters(model: nn.Module, plan: Plan, mesh: DeviceMesh, *, fsdp: bool = False) -> None:
    """Put this rank's shard in the place of each parameter; tied ones stay one parameter."""
    tp_rank = mesh.get_local_rank(TENSOR_PARALLEL)
    done: dict[int, nn.Parameter] = {}
    guessed = {n for e in plan.entries if e.style.name == "replicate" for n in e.splits}
    splits, shapes = plan.splits, plan.shapes
    names = {id(p): n for n, p in model.named_parameters(remove_duplicate=False) if n in splits}
    keep = []  # the whole ones stay alive until all are done: ids must not be used again
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, p in module._parameters.items():
            full = f"{prefix}.{name}" if prefix else name
            if full not in splits and id(p) in names:  # tied to one that the plan names, and as whole as that one
                full = names[id(p)]
            if p is None or id(p) in {id(q) for q in done.values()} or full not in splits:
                continue
            keep.append(p)
            if id(p) not in done:
                split = splits[full]
                with torch.no_grad():
                    local = nn.Parameter(split.take(p, tp_rank) if split.dim is not None else p.detach(), p.requires_grad)
                local.__dict__.update({k: v for k, v in p.__dict__.items() if k != "_tp_shard"})
                local._tp_shard = shard.ParamShard(full, split, shapes[full], mesh, fsdp, full in guessed)  # type: ignore[attr-defined]
                done[id(p)] = local
            module._parameters[name] = done[id(p)]


def bind_styles(model: nn.Module, plan: Plan, axis: Axis, *, loss_parallel: bool) -> None:
    """Let every module of the plan run on its shards: layers first, then what is around them."""
    bound: set[tuple[int, str]] = set()
    for around in (False, True):
        for entry in plan.entries:
            style = entry.style
            if style.splits_parameters == around or not _is_module(model, entry.where):
                continue
            module = model.get_submodule(entry.where)
            if (id(module), str(style)) not in bound:
                bound.add((id(module), str(style)))
                style.bind(module, BindContext(entry.where, axis, loss_parallel))


def _is_module(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False  # the entry is about a parameter
    return True


def sum_groups(plan: Plan, mesh: DeviceMesh) -> dict[int, dist.ProcessGroup]:
    """For each number of neighbouring ranks that sum shares of a gradient, this rank's group of them. A collective."""
    tp = mesh[TENSOR_PARALLEL].size()
    groups = {tp: mesh.get_group(TENSOR_PARALLEL)}
    for n in sorted({s.sum_over for s in plan.splits.values()} - {1, tp}):
        for row in mesh.mesh.tolist():
            for start in range(0, tp, n):
                group = dist.new_group(row[start : start + n], use_local_synchronization=False)
                if dist.get_rank() in row[start : start + n]:
                    groups[n] = group
    return groups


class ParamRegistry:
    """What the parameters of an applied model are."""

    def __init__(self, shards: dict[str, shard.ParamShard], gradients: grad.PartialGradients) -> None:
        self.shards = shards
        self.gradients = gradients

    def __deepcopy__(self, memo: dict[int, Any]) -> ParamRegistry:
        """A copied model sums its own gradients. Its parameters are in `memo`: a module's attributes are copied in their order."""
        of = self.gradients
        twin = ParamRegistry(self.shards, grad.PartialGradients(copy.deepcopy(of.axis, memo), of.groups))
        parameters = []
        for p in of.parameters:
            memo[id(p)]._tp_shard = p._tp_shard  # type: ignore[attr-defined]
            parameters.append(memo[id(p)])
        twin.gradients.watch(parameters)
        grad_norm.register(twin.gradients)
        return twin


def tag_parameters(model: nn.Module) -> None:
    """Tell the parameter objects that the model has now what they are; again after something has replaced them."""
    of: ParamRegistry = model._tp_registry  # type: ignore[assignment]
    parameters = []
    for name, p in model.named_parameters():
        if name in of.shards:
            p._tp_shard = of.shards[name]  # type: ignore[attr-defined]
            parameters.append(p)
    of.gradients.watch(parameters)
    grad_norm.register(of.gradients)
