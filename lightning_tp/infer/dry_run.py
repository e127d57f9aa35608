"""Run a plan on the shards of one rank, with no other ranks there: what raises can't be run, and is kept whole instead.

A safety net under the inference: it follows the whole model's features, and code may do with a shard what could not be foreseen. The
numbers that come out are of no use, since the other ranks' are missing; only that the code runs is looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.fake_world import FakeGroup
from lightning_tp.core.modules.snapshot import MetaWeights, has_more_than, preserve_modules
from lightning_tp.errors import TPError
from lightning_tp.infer.follow.meta import Values
from lightning_tp.infer.repeats import Alike, blocks_once
from lightning_tp.plan.checked import CheckedPlan
from lightning_tp.plan.plan import Plan
from lightning_tp.styles import BindContext, PrepareInput, PrepareOutput

MOST_COPIED = 50_000_000  # parameters, above which the shards are tried without their values


class _Alone(Axis):
    """The tensor-parallel axis, as if the others sent what this rank has."""

    def __init__(self, rank: int, size: int) -> None:
        self.calls: Counter[str] = Counter()
        super().__init__(FakeGroup(rank, size, note=lambda kind, size: self.calls.update([kind])))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Alone:
        return self


def dry_run(
    model: nn.Module, call: Callable[[nn.Module, Any], Any], inputs: Any, plan: Plan, tp: int, alike: Alike
) -> tuple[str, str] | None:
    """Run the plan forward on the shards of the first and of the last rank; of blocks that are alike, one.

    Returns:
        The module whose code raised, and what it raised; None if all ran.
    """
    if tp == 1:
        return None
    if has_more_than(model, MOST_COPIED):
        with MetaWeights(model):
            return dry_run(model, call, inputs, plan, tp, alike)
    try:
        checked = plan.check(model, tp)
    except TPError as e:
        return "", str(e)[:120]
    alike = _with_equal_styles(checked, alike)
    for rank in (0, tp - 1):
        with preserve_modules(model):
            failure = _run_alone(model, call, inputs, checked, _Alone(rank, tp), alike)
        if failure is not None:
            return failure
    return None


def _with_equal_styles(plan: CheckedPlan, alike: Alike) -> Alike:
    """Of blocks that are alike, those for which the plan does the same, too: but for the doors of a stream, which are at its first and last."""
    doors = {e.where for e in plan.entries if isinstance(e.style, (PrepareInput, PrepareOutput))}
    styles: dict[str, list[tuple[str, str]]] = {n: [] for n in {*alike, *alike.values()}}
    for entry in plan.entries:
        where = entry.where
        while where and where not in styles:
            where = where.rpartition(".")[0]
        if where:
            styles[where].append((entry.where[len(where) :], repr(entry.style)))
    first: dict[Any, str] = {}
    found = {}
    for name in [*dict.fromkeys(alike.values()), *alike]:
        if name not in doors:
            like = first.setdefault((alike.get(name, name), tuple(styles[name])), name)
            if like != name:
                found[name] = like
    return found


def _known(model: nn.Module, inputs: Any) -> tuple[Any, Any]:
    """For a model on the meta device: a mode in which code may decide by values that do not depend on weights, and the inputs there."""
    if not any(p.is_meta for p in model.parameters()):
        return nullcontext(), inputs
    values = Values(model)
    return values, values.onto_meta(inputs)


def count_collectives(
    model: nn.Module, loss_of: Callable[[nn.Module, Any], Tensor], inputs: Any, plan: CheckedPlan, tp: int
) -> dict[str, int]:
    """Collectives on the tensor-parallel axis in one forward and backward of a rank, by name; nothing is sent.

    Args:
        model: on any device; left as it was. With weights, the rank computes as if all others had its shards.
        loss_of: runs it on the inputs.
        inputs: on any device.
        plan: checked against it.
        tp: ranks.
    """
    if has_more_than(model, MOST_COPIED):
        with MetaWeights(model):
            return count_collectives(model, loss_of, inputs, plan, tp)
    axis = _Alone(0, tp)
    with preserve_modules(model):
        model.eval()
        _take_shards(model, plan, 0)
        _bind(model, plan, axis)
        shards = dict(model.named_parameters())
        values, inputs = _known(model, inputs)
        with values:
            loss_of(model, inputs).backward()
        summed = {(s.sum_over(tp), shards[n].dtype) for n, s in plan.splits.items() if n in shards and shards[n].grad is not None}
    calls: Counter[str] = axis.calls
    shares = sum(n > 1 for n, _ in summed)  # of gradients: all at once, for each dtype and number of ranks that have some
    return dict(calls + Counter({"all-reduce": shares}))


def _bind(model: nn.Module, plan: CheckedPlan, axis: Axis) -> None:
    """Bind the styles, as `parallelize` does.

    Raises:
        _CantBind: for one that can't be bound.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    bound: set[tuple[int, str]] = set()
    for around in (False, True):
        for entry in plan.entries:
            module = modules.get(entry.where)
            if entry.style.splits_parameters != around and module is not None and (id(module), str(entry.style)) not in bound:
                bound.add((id(module), str(entry.style)))
                try:
                    entry.style.bind(module, BindContext(entry.where, axis))
                except Exception as e:
                    raise _CantBind(entry.where, _told(e)) from e


class _CantBind(Exception):
    """The module, and why."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(where, why)
        self.found = where, why


def _run_alone(
    model: nn.Module, call: Callable[[nn.Module, Any], Any], inputs: Any, plan: CheckedPlan, axis: Axis, alike: Alike
) -> tuple[str, str] | None:
    names = {id(m): n for n, m in model.named_modules()}
    try:
        _take_shards(model, plan, axis.rank)
    except Exception as e:
        return "", _told(e)
    try:
        _bind(model, plan, axis)
    except _CantBind as e:
        return e.found
    stack: list[str] = []
    handles = [
        torch.nn.modules.module.register_module_forward_pre_hook(lambda m, _: stack.append(names.get(id(m), "?"))),
        torch.nn.modules.module.register_module_forward_hook(lambda m, _, o: (stack.pop(), None)[1]),
    ]
    try:
        values, inputs = _known(model, inputs)
        with torch.no_grad(), blocks_once(model, None, alike, set()), values:
            call(model, inputs)
    except Exception as e:
        if ("meta" in str(e) or "device" in str(e)) and any(p.is_meta for p in model.parameters()):
            return None  # it decides by values, which are not there: it may run with them
        return next((n for n in reversed(stack) if n != "?"), ""), _told(e)
    finally:
        for h in handles:
            h.remove()
    return None


def _told(e: Exception) -> str:
    return f"{type(e).__name__}: {e}".splitlines()[0][:120]


def _take_shards(model: nn.Module, plan: CheckedPlan, rank: int) -> None:
    splits, done = plan.splits, {}
    by_id = {id(p): n for n, p in model.named_parameters(remove_duplicate=False) if n in splits}
    keep = list(model.parameters())  # ids must not be used again
    for module in list(model.modules()):
        for name, p in module._parameters.items():
            if p is None or id(p) not in by_id:
                continue
            split = splits[by_id[id(p)]]
            if id(p) not in done:
                done[id(p)] = nn.Parameter(split.take(p.detach(), rank) if split.dim is not None else p.detach(), p.requires_grad)
            module._parameters[name] = done[id(p)]
    del keep
