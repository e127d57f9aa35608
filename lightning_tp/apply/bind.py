"""Cut every parameter of a model to this rank's shard, bind the styles of a plan to its modules, and sum what gradients are partial.

`replace_parameters` and `bind_styles` serve all that run a plan: `parallelize`, the dry run of an inferred plan, and the estimator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_tp._compat import fsdp_parameters, own_parameters, unsharded_parameter
from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.mesh import TENSOR_PARALLEL
from lightning_tp.core.modules.swap_class import swap_class
from lightning_tp.errors import TPError
from lightning_tp.plan.checked import CheckedPlan
from lightning_tp.plan.rule import INFERRED
from lightning_tp.shards.grad_norm import register
from lightning_tp.shards.gradients import PartialGradients, UserHooks, take_hooks
from lightning_tp.shards.parameter import shard_like
from lightning_tp.shards.shard import ParamShard
from lightning_tp.styles import BindContext, Replicate, Split
from lightning_tp.styles.base import ReplacedForward
from lightning_tp.styles.linear import runs_torchs_code

SIZES = ("in_features", "out_features", "num_embeddings", "embedding_dim")  # that code reads from a layer


class BindError(TPError):
    """A style could not be bound to a module.

    Attributes:
        where: the name of the module.
    """

    def __init__(self, where: str, cause: Exception) -> None:
        text = str(cause) if isinstance(cause, TPError) else f"`{where}`: {type(cause).__name__}: {cause}"
        super().__init__(text)
        self.where = where


def split_parameters(model: nn.Module, plan: CheckedPlan, mesh: DeviceMesh, *, fsdp: bool = False) -> dict[str, UserHooks]:
    """Make each parameter this rank's shard of it, which knows what it is (`_tp_shard`); return the hooks that they had, by name."""
    rank = mesh.get_local_rank(TENSOR_PARALLEL)
    hooks: dict[str, UserHooks] = {}
    stated = {name for entry in plan.entries if isinstance(entry.style, Replicate) for name in entry.splits}

    def shard_of(name: str, p: nn.Parameter, split: Split) -> nn.Parameter:
        if mesh.size() > 1 and (found := take_hooks(p)) is not None:
            hooks[name] = found
        if split.dim is not None:  # in the same object: hooks, lists and closures hold it
            shard, other = split.take(p.detach(), rank), torch.float32 if p.dtype == torch.float64 else torch.float64
            # by way of another dtype, for which autograd forgets the full shape: a graph from before the split (a loss in a list) keeps it alive
            p.data = p.detach().new_empty(0, dtype=other)
            p.data, p.grad = shard, None
        return shard_like(p, ParamShard(name, split, plan.shapes[name], mesh, fsdp and p.ndim > 0, name in stated))

    replace_parameters(model, plan, shard_of)
    return hooks


def local_parameter(p: nn.Parameter, split: Split, rank: int) -> nn.Parameter:
    """Return the shard that `rank` holds of `p`, as a parameter of its own; a full one shares its memory."""
    with torch.no_grad():
        return nn.Parameter(p.detach() if split.dim is None else split.take(p, rank), p.requires_grad)


def replace_parameters(model: nn.Module, plan: CheckedPlan, make: Callable[[str, nn.Parameter, Split], nn.Parameter]) -> None:
    """Put `make(name, parameter, split)` in the place of each parameter; tied ones stay one parameter.

    Args:
        model: changed in place.
        plan: checked against it.
        make: given the name under which the plan covers the parameter.
    """
    splits = plan.splits
    names: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if name in splits:
            names.setdefault(id(p), name)
    before = list(model.parameters())  # kept until all are replaced: an id must not be used again
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for leaf, own in own_parameters(module).items():
            if own is not None and id(own) in names:
                if id(own) not in made:
                    made[id(own)] = make(names[id(own)], own, splits[names[id(own)]])
                own_parameters(module)[leaf] = made[id(own)]
    del before


def bind_styles(model: nn.Module, plan: CheckedPlan, axis: Axis, *, loss_parallel: bool = True) -> None:
    """Make every module of the plan run on its shards: layers first, then the modules around them.

    Raises:
        BindError: for a style that can't be bound; it names the module.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    _take_in_forwards(model)
    # an inferred plan has followed code that reads these: it changes what is done with the full size
    inferred = plan.source.startswith(INFERRED)
    full = [(m, {k: m.__dict__[k] for k in SIZES if k in m.__dict__}) for m in model.modules() if inferred and _is_torchs(m)]
    bound: set[tuple[int, str]] = set()
    for splits_parameters in (True, False):
        for entry in plan.entries:
            style, module = entry.style, modules.get(entry.where)
            if module is None or style.splits_parameters != splits_parameters or (id(module), str(style)) in bound:
                continue  # a parameter; the other turn; a module with two names
            bound.add((id(module), str(style)))
            try:
                style.bind(module, BindContext(entry.where, axis, loss_parallel))
            except Exception as error:
                raise BindError(entry.where, error) from error
    for module, sizes in full:
        module.__dict__.update(sizes)


def _is_torchs(module: nn.Module) -> bool:
    return runs_torchs_code(module) or (isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward)


def _take_in_forwards(model: nn.Module) -> None:
    """Let a forward that was put on a module itself be that of its class, under which a style runs it."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), (FunctionType, MethodType, partial)):  # an object may call that of the class
            swap_class(module, ReplacedForward, _replaced=module.__dict__.pop("forward"))


def sum_groups(plan: CheckedPlan, mesh: DeviceMesh) -> dict[int, dist.ProcessGroup]:
    """Return, for each number of neighbouring ranks that sum a gradient, the group of them that this rank is in. A collective."""
    tp = mesh[TENSOR_PARALLEL].size()
    groups = {tp: mesh.get_group(TENSOR_PARALLEL)}
    for n in sorted({s.sum_over(tp) for s in plan.splits.values()} - {1, tp}):
        for row in mesh.mesh.tolist():
            for start in range(0, tp, n):
                group = dist.new_group(row[start : start + n], use_local_synchronization=False)
                if dist.get_rank() in row[start : start + n]:
                    groups[n] = group
    return groups


class ParamRegistry:
    """What the parameters of an applied model are, by name; kept on the model as `_tp_registry`."""

    def __init__(self, shards: dict[str, ParamShard], gradients: PartialGradients) -> None:
        self.shards = shards
        self.gradients = gradients
        self.fsdp_root: nn.Module | None = None
        self.unsharded: list[Any] = []  # FSDP2's records of parameters whose unsharded ones don't know yet what they are

    def tag_unsharded(self) -> None:
        """Tell the parameters that FSDP2 has put in place of its sharded ones what they are: until it reshards them, user code sees these."""
        waiting = []
        for record in self.unsharded:
            if (p := unsharded_parameter(record)) is None:
                waiting.append(record)
                continue
            sharded = record.sharded_param
            shard_like(p, replace(sharded._tp_shard, fsdp=False))
            p._tp_gradients, p._tp_sharded = self.gradients, sharded  # type: ignore[attr-defined]
        self.unsharded = waiting

    def __deepcopy__(self, memo: dict[int, Any]) -> ParamRegistry:
        """A copied model sums its own gradients. Its parameters are in `memo`: a module's attributes are copied in their order."""
        of = self.gradients
        twin = ParamRegistry(self.shards, PartialGradients(copy.deepcopy(of.axis, memo), of.groups))
        parameters = []
        for p in of.parameters:
            parameters.append(shard_like(memo[id(p)], p._tp_shard))  # type: ignore[attr-defined]
        twin.gradients.watch(parameters)
        register(twin.gradients)
        return twin


def check_unchanged(model: nn.Module) -> None:
    """Refuse a model whose parameters were added, removed or renamed since it was split: these would be neither sharded nor kept equal.

    Raises:
        TPError: it names the first of them.
    """
    registry: ParamRegistry | None = model.__dict__.get("_tp_registry")
    if registry is None:
        return
    names = {name for name, _ in model.named_parameters()}
    if names != registry.shards.keys():
        new, gone = sorted(names - registry.shards.keys()), sorted(registry.shards.keys() - names)
        what = "; ".join(f"{word}: `{found[0]}` ({len(found)} in all)" for word, found in (("new", new), ("gone", gone)) if found)
        raise TPError(
            f"The parameters of {type(model).__name__} were changed after it was split ({what}). Wrap modules (DistributedDataParallel, "
            "pruning, adapters) and add parameters in `__init__` or `configure_model`, before the split; data parallelism is `TPStrategy(dp=..)`."
        )


def tag_parameters(model: nn.Module) -> None:
    """Tell the parameter objects that the model has now what they are; again after something has replaced them."""
    registry: ParamRegistry = model._tp_registry  # type: ignore[assignment]
    parameters = []
    for name, p in model.named_parameters():
        if name in registry.shards:
            parameters.append(shard_like(p, registry.shards[name]))
    registry.gradients.watch(parameters)
    registry.unsharded = fsdp_parameters(model)
    register(registry.gradients)
