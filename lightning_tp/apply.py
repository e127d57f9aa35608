"""`parallelize`: a plan onto a model, in place. The order of the steps and nothing else."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_tp import border, grad, materialize
from lightning_tp.checkpoint.pretrained import read_shards, waiting
from lightning_tp.comm import Axis
from lightning_tp.compiled import Compile, check_compile, compile_blocks, take_back
from lightning_tp.declared import declared_plan
from lightning_tp.dropout import Dropout, bind_dropout, draws_of
from lightning_tp.errors import TPError
from lightning_tp.fsdp import apply_fsdp, find_blocks
from lightning_tp.mesh import TENSOR_PARALLEL, check_mesh
from lightning_tp.plan import Plan
from lightning_tp.plan_check import any_split, refuse_wrapped, splits_nothing
from lightning_tp.recompute import Recompute, check_recompute, chosen, run_again
from lightning_tp.styles import Site

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy

PlanLike = Plan | Mapping[str, Any] | str | Path
BUCKET = 2**23  # elements that are broadcast at once


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    plan: PlanLike | None = None,
    *,
    sequence_parallel: bool = True,
    loss_parallel: bool = True,
    activation_checkpointing: Recompute | None = None,
    compile: Compile = False,
    precision: MixedPrecisionPolicy | None = None,
    dropout: Dropout = "independent",
    backend: Literal["local", "dtensor"] = "local",
    device: torch.device | None = None,
    fsdp_root: nn.Module | None = None,
) -> nn.Module:
    """Split `model` over the tensor-parallel axis of `mesh`, then shard it by FSDP2 over the data-parallel axis.

    Every rank calls it with the same model. Afterwards the model is called as before, with the same inputs, and shows what one
    process would show; every rank of a tensor-parallel group has to be given the same batch. Its parameters are this rank's
    plain shards (FSDP2's DTensors over the data-parallel axis, where that has more than one rank), its state dict shows
    DTensors over the mesh.

    Args:
        model: on any device, or on the meta device (then its weights are drawn here, equal to those of one process).
        mesh: 2D, with the axes ("data_parallel", "tensor_parallel").
        plan: how; a mapping pattern -> style, a `Plan`, or the path of its JSON. Default: the one that the model declares.
        sequence_parallel: False keeps activations whole between the split modules, whatever the plan says.
        loss_parallel: False gathers the logits of a `vocab_head`.
        activation_checkpointing: "block" keeps of each repeated block only its input for the backward, and runs it again; "selective" also
            what is dear to compute (products, attention, sums over ranks); a function (name, module) -> bool chooses the modules that are run
            again.
        compile: True compiles each repeated block by `torch.compile`; the name of a backend, or a function like one, does it by that.
        precision: FSDP2's policy; it acts where the data-parallel axis has more than one rank.
        dropout: "independent" draws masks of each rank's own for shards of an activation, and equal ones for whole activations; "exact" draws
            those of one process, for comparing runs.
        backend: "local" computes on plain tensors; "dtensor" applies the same plan by `parallelize_module` of torch.
        device: where a model on the meta device goes. Default: the mesh's.
        fsdp_root: the module inside `model` that is called, if it isn't `model` itself.

    Returns:
        The same model.

    Raises:
        TPError: before anything is changed, for a plan that does not fit the model or is not the same on all ranks, or a
            model that is distributed already.

    Example:
        >>> from lightning_tp.testing import single_rank_mesh
        >>> with single_rank_mesh() as mesh:
        ...     model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
        ...     parallelize(model, mesh, {"0": "colwise", "1": "rowwise"})(torch.zeros(1, 2, 4)).shape
        torch.Size([1, 2, 4])
    """
    dp_mesh, tp_mesh = check_mesh(mesh)
    check_options(activation_checkpointing, compile, dropout, backend)
    compile = take_back(model) or compile
    plan = resolve_plan(model, plan, tp_mesh.size(), sequence_parallel=sequence_parallel)
    same_plan_everywhere(plan, mesh)
    if tp_mesh.size() > 1 and not any_split(plan.entries) and dist.get_rank() == 0:
        warnings.warn(splits_nothing(plan, model, tp_mesh.size()), stacklevel=2)
    blocks = [block for _, block in find_blocks(model)]
    again = chosen(model, blocks, activation_checkpointing) if activation_checkpointing is not None else []
    stored = waiting(model)
    whole_values = materialize.source_of(model, stored)
    if whole_values is not None and backend == "dtensor":
        raise TPError("`backend='dtensor'`: a model on the meta device stays there. Build it on the CPU, or use `backend='local'`.")
    same_weights_everywhere(model, mesh)
    axis = Axis(tp_mesh.get_group())
    model._ltp_plan = plan  # type: ignore[assignment]

    if backend == "dtensor":
        return _parallelize_by_torch(model, mesh, plan, blocks, precision, fsdp_root)
    split_parameters(model, plan, mesh, fsdp=dp_mesh.size() > 1)
    if tp_mesh.size() > 1:
        bind_styles(model, plan, axis, loss_parallel=loss_parallel)
    compiling = compile_blocks(blocks, compile) if compile else None
    if activation_checkpointing is not None:
        run_again(again, axis, activation_checkpointing)
    shards = {name: p._ltp for name, p in model.named_parameters()}  # type: ignore[attr-defined]
    if dp_mesh.size() > 1:
        apply_fsdp(fsdp_root or model, blocks, dp_mesh, precision=precision)
    if whole_values is not None:
        materialize.fill(model, same_values_everywhere(whole_values, mesh), shards, device or torch.device(mesh.device_type))
    gradients = grad.PartialGradients(axis, sum_groups(plan, mesh))
    model._ltp_adopt = _Adopt(shards, gradients)  # type: ignore[assignment]
    adopt(model)
    read_shards(model, stored)
    border.attach_state_dict(model)
    if tp_mesh.size() > 1:
        bind_dropout(model, axis, dropout)
    if compiling is not None:
        compiling.draws = draws_of(model)
    return model


def check_options(recompute: Recompute | None, compile: Compile, dropout: Dropout, backend: str) -> None:
    """Refuse options that don't go together, or don't exist.

    Raises:
        TPError: it says which.
    """
    if dropout not in ("independent", "exact") or (dropout == "exact" and backend == "dtensor"):
        raise TPError(f"`dropout={dropout!r}`: there is 'independent', and 'exact' with `backend='local'`.")
    check_recompute(recompute)
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


def resolve_plan(model: nn.Module, plan: PlanLike | None, tp: int, *, sequence_parallel: bool = True) -> Plan:
    """The checked plan for `model`: the one given, else the one that it declares.

    Raises:
        TPError: if there is neither, or it does not fit.
    """
    refuse_wrapped(model)
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


def same_plan_everywhere(plan: Plan, mesh: DeviceMesh) -> None:
    """Compare the hash of the plan over all ranks of the mesh.

    Raises:
        TPError: on all ranks, if they differ.
    """
    digests: list[Any] = [plan.digest]
    for axis in mesh.mesh_dim_names or ():
        gathered: list[Any] = [None] * mesh[axis].size()
        dist.all_gather_object(gathered, digests, group=mesh.get_group(axis))
        digests = [d for of in gathered for d in of]
    if len(set(digests)) > 1:
        raise TPError(
            f"The ranks have {len(set(digests))} different plans ({', '.join(dict.fromkeys(digests))}): their models or rules differ. "
            "Build the same model with the same arguments on every rank."
        )


@torch.no_grad()
def same_weights_everywhere(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give every rank the first one's parameters and buffers, where they are not equal already.

    Ranks that were not seeded alike draw different weights, and nothing in torch or Lightning makes replicated ones equal.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if t.numel() and not t.is_meta}
    _make_equal(list(tensors.values()), mesh)


@torch.no_grad()
def same_values_everywhere(values: materialize.Values, mesh: DeviceMesh) -> materialize.Values:
    """The same for values that are drawn one after the other."""
    for names, whole in values:
        _make_equal([whole] if whole.numel() else [], mesh)
        yield names, whole


def _make_equal(tensors: list[Tensor], mesh: DeviceMesh) -> None:
    if not tensors:
        return
    target = torch.device(mesh.device_type)
    sums = torch.stack([_checksum(t) for t in tensors]).to(target)
    for axis in mesh.mesh_dim_names or ():
        group = mesh.get_group(axis)
        if group.size() == 1:
            continue
        every = sums.new_empty((group.size() * sums.shape[0], *sums.shape[1:]))
        group._allgather_base(every, sums).wait()
        differ = (every.view(group.size(), *sums.shape) != sums).flatten(2).any(2).any(0)
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
        flags = differ.to(torch.int32)
        group.allreduce([flags], options).wait()
        _broadcast([t for t, d in zip(tensors, flags.tolist(), strict=True) if d], group, target)
        sums = torch.stack([_checksum(t) for t in tensors]).to(target) if bool(flags.any()) else sums


def _checksum(t: Tensor) -> Tensor:
    """Two exact sums over the bytes of a tensor, of which one knows their order."""
    raw = t.detach().contiguous().view(-1).view(torch.uint8) if t.dtype != torch.bool else t.detach().reshape(-1).to(torch.uint8)
    half = raw[: raw.numel() // 2].sum(dtype=torch.int64)
    return torch.stack((raw.sum(dtype=torch.int64), half)).cpu()


def _broadcast(tensors: list[Tensor], group: dist.ProcessGroup, device: torch.device) -> None:
    for t in tensors:
        flat = t.detach().to(device).contiguous()
        for piece in flat.view(-1).split(BUCKET):
            dist.broadcast(piece, group=group, group_src=0)
        t.copy_(flat)


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
                local.__dict__.update({k: v for k, v in p.__dict__.items() if k != "_ltp"})
                local._ltp = border.Shard(full, split, shapes[full], mesh, fsdp, full in guessed)  # type: ignore[attr-defined]
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
                style.bind(module, Site(entry.where, axis, loss_parallel))


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


class _Adopt:
    """What the parameters of an applied model are."""

    def __init__(self, shards: dict[str, border.Shard], gradients: grad.PartialGradients) -> None:
        self.shards = shards
        self.gradients = gradients

    def __deepcopy__(self, memo: dict[int, Any]) -> _Adopt:
        """A copied model sums its own gradients. Its parameters are in `memo`: a module's attributes are copied in their order."""
        of = self.gradients
        twin = _Adopt(self.shards, grad.PartialGradients(copy.deepcopy(of.axis, memo), of.groups))
        parameters = []
        for p in of.parameters:
            memo[id(p)]._ltp = p._ltp  # type: ignore[attr-defined]
            parameters.append(memo[id(p)])
        twin.gradients.watch(parameters)
        grad.register(twin.gradients)
        return twin


def adopt(model: nn.Module) -> None:
    """Tell the parameter objects that the model has now what they are; again after something has replaced them."""
    of: _Adopt = model._ltp_adopt  # type: ignore[assignment]
    parameters = []
    for name, p in model.named_parameters():
        if name in of.shards:
            p._ltp = of.shards[name]  # type: ignore[attr-defined]
            parameters.append(p)
    of.gradients.watch(parameters)
    grad.register(of.gradients)


def _parallelize_by_torch(
    model: nn.Module,
    mesh: DeviceMesh,
    plan: Plan,
    blocks: list[nn.Module],
    precision: MixedPrecisionPolicy | None,
    fsdp_root: nn.Module | None,
) -> nn.Module:
    """The same plan by PyTorch's own styles, parameters as DTensors: the reference, and the way out."""
    from torch.distributed.tensor.parallel import parallelize_module

    dp_mesh, tp_mesh = check_mesh(mesh)
    tied = sorted(plan.tied)
    if tied and any(plan.splits[n].dim is not None for n in tied if n in plan.splits):
        raise TPError(
            f"`backend='dtensor'`: PyTorch's styles untie `{tied[0]}` without a word. Use `backend='local'`, or untie it."
        )
    if tp_mesh.size() > 1:
        parallelize_module(model, tp_mesh, plan.to_torch(model))
    if dp_mesh.size() > 1:
        apply_fsdp(fsdp_root or model, blocks, dp_mesh, precision=precision)
    return model
