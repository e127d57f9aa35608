"""Enter the local view of parameters where a model is called, so that its forward runs on plain shards; code around it sees full parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any
from weakref import ref

from torch import nn
from torch.compiler import is_compiling
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_tp._compat import call_in_forward, graph_task, is_resharded
from lightning_tp.apply.bind import ParamRegistry
from lightning_tp.apply.unsplit import LateHooks, Ways, watch_hooks
from lightning_tp.core.modules.blocks import starred
from lightning_tp.core.modules.outer_calls import is_called, remembered_calls
from lightning_tp.core.modules.swap_class import swap_class
from lightning_tp.plan.checked import CheckedPlan
from lightning_tp.plan.declared import DECLARED
from lightning_tp.shards.view import depth, set_depth
from lightning_tp.styles import Replicate


class _Entry(nn.Module):
    """A module that user code calls."""

    _registry: ref[ParamRegistry]
    _unit: Callable[[], nn.Module | None]  # of FSDP2, that its parameters belong to, unless that is the root
    _ways: Ways | None  # of one that holds everything that is split

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if depth() > 0 or is_compiling():
            return super().__call__(*args, **kwargs)
        ways = self._ways
        return self._on_shards(*args, **kwargs) if ways is None else ways.call(self, self._on_shards, args, kwargs)

    def _on_shards(self, *args: Any, **kwargs: Any) -> Any:
        before = depth()
        registry = self._registry()
        call: Callable[..., Any] = super().__call__
        for around in () if registry is None else (self._unit(), registry.fsdp_root):
            if around is not None and around is not self and is_resharded(around):
                call = partial(call_in_forward, around, call)
        set_depth(1)
        try:
            return call(*args, **kwargs)
        finally:
            if registry is not None and registry.unsharded:
                registry.tag_unsharded()
            set_depth(before)


class _Inner(_Entry):
    """A module inside of an entry, which user code has not called by itself when the plan was made: as it does, that is compared with one process."""

    _alone: Ways

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if depth() > 0 or is_compiling():
            return super(_Entry, self).__call__(*args, **kwargs)
        if graph_task() != -1:  # it is computed again
            return self._on_shards(*args, **kwargs)
        return self._alone.call(self, self._on_shards, args, kwargs)


def enter_local_view(model: nn.Module, ways: Callable[..., Ways | None], mode: bool) -> None:
    """Make calls of a split model, and of the modules in it that user code may call by themselves, run in `local_view`.

    Args:
        model: a module with a `training_step` is user code itself; what it holds is called.
        ways: makes the ways of a module that calls of it go, from the mode in which the first is trusted, and whether it is `strict`.
        mode: that in which the plan was made, unless the model declares it.
    """
    named = [(n, m) for n, m in model.named_modules() if is_called(m)]
    for _, module in named:
        module.__dict__["_tp_planned"] = True
    registry: ParamRegistry = model._tp_registry  # type: ignore[assignment]
    every = registry.fsdp_root is not None  # each may be called while the root's parameters are sharded
    plan: CheckedPlan = model._tp_applied_plan  # type: ignore[assignment]
    trusted = None if plan.source.startswith(DECLARED) else mode
    called, units = remembered_calls(model), _units(model, registry.fsdp_root)
    outermost, styled, partial_sums = set(map(id, entries(model))), _styled(model), _styled(model, partial_sums=True)
    families = None if called is None else set(map(starred, called))  # of repeated blocks, the first batch may have left out some
    for name, module in named:
        known = families is not None and starred(name) in families
        around = {"_registry": ref(registry), "_unit": units.get(id(module), _no_unit)}
        strict = families is not None or id(module) in partial_sums
        inner = id(module) not in outermost and not known and not styled.isdisjoint(map(id, module.modules()))
        if inner and (alone := ways(None, strict=strict)):
            swap_class(module, _Inner, **around, _ways=None, _alone=alone)
        elif every or known or id(module) in outermost:
            swap_class(module, _Entry, **around, _ways=ways(trusted) if _holds_all(module, model) else None)
    late = LateHooks(model)
    for module in model.modules():
        if not hasattr(module, "training_step"):
            module.__dict__["_tp_late_hooks"] = late
    watch_hooks()
    _watch_optimizers()


@cache
def _watch_optimizers() -> None:
    """Make the steps of all optimizers run in `local_view`, and their closures outside of it."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


_depths: list[int] = []  # outside of the steps that run


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not _holds_shards(optimizer):
        return args, kwargs
    outside = depth()
    _depths.append(outside)
    inner = len(_depths)
    set_depth(max(outside, 0) + 1)

    def at_outer(closure: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            inside = depth()
            set_depth(outside)
            try:
                out = closure(*args, **kwargs)
            except BaseException:  # the step is left, too: nothing is called after it
                del _depths[inner - 1 :]
                raise
            set_depth(inside)
            return out

        return run if callable(closure) else closure

    return (args[0], *map(at_outer, args[1:])), {k: at_outer(v) for k, v in kwargs.items()}


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if _depths and _holds_shards(optimizer):  # else its closure has raised, and the step went on
        set_depth(_depths.pop())


def _holds_shards(optimizer: Optimizer) -> bool:
    first = next((p for group in optimizer.param_groups for p in group["params"]), None)
    return hasattr(first, "_tp_shard")


def _holds_all(module: nn.Module, model: nn.Module) -> bool:
    """Return whether all that is split is inside of a module, so that what it returns is full."""
    plan: CheckedPlan = model._tp_applied_plan  # type: ignore[assignment]
    inside = {id(m) for m in module.modules()}
    own = dict(model.named_modules(remove_duplicate=False))
    for entry in plan.entries:
        if isinstance(entry.style, Replicate):
            continue
        styled = own.get(entry.where, own.get(entry.where.rpartition(".")[0]))
        if id(styled) not in inside or (own.get(entry.where) is module and entry.style.splits_parameters):
            return False
    return True


def _units(model: nn.Module, root: nn.Module | None) -> dict[int, Callable[[], nn.Module | None]]:
    """Return, by the id of a module inside of a unit of FSDP2, that unit: the innermost one, unless it is the root."""
    units = [m for m in model.modules() if isinstance(m, FSDPModule) and m is not root] if root is not None else []
    return {id(inside): ref(unit) for unit in units for inside in unit.modules()}


def _no_unit() -> None:
    """Return None, in place of a reference to a unit."""


def _styled(model: nn.Module, *, partial_sums: bool = False) -> set[int]:
    """Return the ids of the modules that don't run on a rank as in one process, or of those with gradients that are summed over ranks."""
    plan: CheckedPlan = model._tp_applied_plan  # type: ignore[assignment]
    own = dict(model.named_modules(remove_duplicate=False))
    found = [
        own.get(e.where, own.get(e.where.rpartition(".")[0]))
        for e in plan.entries
        if (any(s.sum_over(plan.tp) > 1 for s in e.splits.values()) if partial_sums else not isinstance(e.style, Replicate))
    ]
    return set(map(id, found))


def entries(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules that have a forward of their own, and those in containers of them."""
    if next(model.parameters(), None) is None:
        return
    if not hasattr(model, "training_step") and type(model).forward is not nn.Module.forward:
        yield model
        if not isinstance(model, nn.Sequential):
            return
    for child in {id(m): m for m in model.children()}.values():
        yield from entries(child)
