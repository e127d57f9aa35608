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
from lightning_tp.plan.checked import CheckedPlan, Entry
from lightning_tp.plan.declared import DECLARED
from lightning_tp.shards.view import depth, set_depth
from lightning_tp.styles import Replicate


class _Entry(nn.Module):
    """A module that user code calls."""

    _registry: ref[ParamRegistry]
    _unit: Callable[[], nn.Module | None]  # of FSDP2, that its parameters belong to, unless that is the root
    _ways: Ways | None  # of one that holds everything that is split
    _alone: Ways | None  # of one inside of an entry that user code had not called by itself when the plan was made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if depth() > 0 or is_compiling():
            return super().__call__(*args, **kwargs)
        ways = self._ways or (self._alone if graph_task() == -1 else None)  # in a backward pass it is computed again
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
    applied, outermost, units = list(_with_modules(model, plan)), set(map(id, entries(model))), _units(model, registry.fsdp_root)
    split = [x for x in applied if not isinstance(x[0].style, Replicate)]
    called = remembered_calls(model)
    families = None if called is None else set(map(starred, called))  # of repeated blocks, the first batch may have left out some
    inner = _not_called(named, applied, split, outermost, families, plan.tp)
    for name, module in named:
        if every or id(module) in outermost or id(module) in inner or starred(name) in (families or ()):
            alone = ways(None, strict=inner[id(module)]) if id(module) in inner else None
            whole = ways(trusted) if alone is None and _holds_all(module, split) else None
            swap_class(module, _Entry, _registry=ref(registry), _unit=units.get(id(module), _no_unit), _ways=whole, _alone=alone)
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


def _holds_all(module: nn.Module, split: list[_Applied]) -> bool:
    """Return whether all that is split is inside of a module, so that what it returns is full."""
    inside = {id(m) for m in module.modules()}
    return not any(
        id(styled) not in inside or (named is module and entry.style.splits_parameters) for entry, named, styled in split
    )


def _units(model: nn.Module, root: nn.Module | None) -> dict[int, Callable[[], nn.Module | None]]:
    """Return, by the id of a module inside of a unit of FSDP2, that unit: the innermost one, unless it is the root."""
    units = [m for m in model.modules() if isinstance(m, FSDPModule) and m is not root] if root is not None else []
    return {id(inside): ref(unit) for unit in units for inside in unit.modules()}


def _no_unit() -> None:
    """Return None, in place of a reference to a unit."""


_Applied = tuple[Entry, "nn.Module | None", "nn.Module | None"]


def _with_modules(model: nn.Module, plan: CheckedPlan) -> Iterator[_Applied]:
    """Yield (entry of the plan, the module of its name, that or the one whose parameter the name is)."""
    own = dict(model.named_modules(remove_duplicate=False))
    for entry in plan.entries:
        named = own.get(entry.where)
        yield entry, named, own.get(entry.where.rpartition(".")[0]) if named is None else named


def _not_called(
    named: list[tuple[str, nn.Module]],
    applied: list[_Applied],
    split: list[_Applied],
    outermost: set[int],
    families: set[str] | None,
    tp: int,
) -> dict[int, bool]:
    """Return the ids of modules inside of entries that the first batch has not called by themselves, and whether their ways are strict.

    Args:
        named: the modules that user code may call.
        applied: the entries of the plan.
        split: those of modules that don't run on a rank as in one process.
        outermost: ids of the modules that user code calls.
        families: names (stars) of modules that it has called; None: that is not known.
        tp: ranks that share the model.
    """
    styled = {id(module) for _, _, module in split}
    partial_sums = {id(module) for entry, _, module in applied if any(of.sum_over(tp) > 1 for of in entry.splits.values())}
    return {
        id(module): families is not None or id(module) in partial_sums
        for name, module in named
        if id(module) not in outermost
        and starred(name) not in (families or ())
        and not styled.isdisjoint(map(id, module.modules()))
    }


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
