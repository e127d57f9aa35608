"""Sum the partial gradients of parameters over the ranks, once per backward pass.

A parameter in the state `R` (a norm on this rank's shard of the sequence, a bias added to it, key/value heads that ranks share) gets a
term of its gradient on each rank. The autograd functions in `core/comm/transitions.py` notify `PartialGradients` when a backward
pass begins; when it is over, all partial gradients are summed in one all-reduce (and one more for each group of ranks that share
heads), so that `.grad` is right as soon as `loss.backward()` returns.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from lightning_tp._compat import (
    all_gather_into,
    flatten,
    foreach_copy_,
    local_tensor,
    queue_after_backward,
    take_hooks_of,
    unflatten,
)
from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.mesh import DATA_PARALLEL
from lightning_tp.core.comm.state import I, R
from lightning_tp.errors import TPError
from lightning_tp.shards.shard import ParamShard, like
from lightning_tp.shards.view import full_view, local_view

CHECKED_PASSES = 1  # in the first backward pass, gradients are compared over ranks with what the plan says of them
TOLERANCE = 1e-2


@dataclass
class _Partial:
    """A parameter whose gradient, or a part of it, is partial, and the ranks that hold the other terms."""

    parameter: torch.nn.Parameter
    shard: ParamShard
    group: dist.ProcessGroup

    def term(self) -> Tensor:
        """The part of the gradient that is a term of a sum, as a view."""
        assert self.parameter.grad is not None
        return self.shard.summed_part(local_tensor(self.parameter.grad))


@dataclass
class UserHooks:
    """The hooks that a user has registered on one parameter."""

    gradient: OrderedDict[int, Callable[[Tensor], Tensor | None]]
    accumulated: OrderedDict[int, Callable[[Any], None]]

    def call_with_gradient(self, p: Any) -> None:
        """Call the hooks with the full gradient; what they return takes its place."""
        if p.grad is not None and self.gradient:
            local_tensor(p.grad).copy_(self.changed(p.grad, p._tp_shard))

    def changed(self, grad: Tensor, shard: ParamShard) -> Tensor:
        """Return the local gradient after the hooks."""
        full = shard.gather(grad)
        with full_view():
            for hook in tuple(self.gradient.values()):
                out = hook(full)
                full = full if out is None else out
        return shard.take(full)

    def call_with_parameter(self, p: Any) -> None:
        """Call the post-accumulate hooks."""
        if p.grad is not None and self.accumulated:
            with full_view():
                for hook in tuple(self.accumulated.values()):
                    hook(p)


def take_hooks(p: Any) -> UserHooks | None:
    """Take away the hooks of a parameter that is about to be split, and return them; their handles still remove them."""
    gradient, accumulated = take_hooks_of(p)
    if not gradient and not accumulated:
        return None
    return UserHooks(OrderedDict() if gradient is None else gradient, OrderedDict() if accumulated is None else accumulated)


def _begin_of(gradients: ref[PartialGradients]) -> Callable[[Tensor], None]:
    def begin(_: Tensor) -> None:
        found = gradients()
        if found is not None:
            found.begin()

    return begin


class PartialGradients:
    """Sums partial gradients at the end of each backward pass.

    Gradients that an earlier pass has summed (accumulation over micro-batches) are set aside while a pass runs, and added to its own
    afterwards: so only what is new is summed.

    Args:
        axis: the tensor-parallel axis; its `on_backward` is set to `begin`.
        groups: for each number of neighbouring ranks that sum a gradient, the group of them that this rank is in.
        hooks: those that users have registered, by the parameter's name.
    """

    def __init__(self, axis: Axis, groups: dict[int, dist.ProcessGroup], hooks: dict[str, UserHooks] | None = None) -> None:
        self.axis = axis
        self.groups = groups
        self.parameters: list[torch.nn.Parameter] = []
        self.partial: list[_Partial] = []
        self.hooks = {} if hooks is None else hooks
        self._hooked: list[tuple[torch.nn.Parameter, UserHooks]] = []
        self._averaged: list[torch.nn.Parameter] = []  # over the data-parallel axis: what FSDP2 can't shard
        self._equal: dict[
            torch.nn.Parameter, Tensor
        ] = {}  # gradients of this pass that are no terms, of parameters not decided yet
        self._returning = False  # `torch.autograd.grad` returns the gradients of the pass
        self._full: list[torch.nn.Parameter] = []  # whose gradients are compared over the ranks
        self._undecided: list[torch.nn.Parameter] = []  # of which the plan does not say whether their gradients are partial
        self.passes = 0
        self.defer = False  # leave sums to a later pass: see `no_sync`
        self._deferred = False  # `.grad` holds terms of earlier passes that are not summed yet
        self._pass: Callable[[], object] = lambda: None  # weak: autograd drops the callback of a pass that fails, too
        axis.on_backward = self.begin

    def watch(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum the gradients of these parameters from now on, and of no others."""
        self.parameters = list(parameters)
        self._sharded = any(isinstance(p, DTensor) for p in self.parameters)
        self.partial, self._full, self._undecided, self._hooked, self._averaged = [], [], [], [], []
        for p in self.parameters:
            shard: ParamShard = p._tp_shard  # type: ignore[attr-defined]
            p._tp_gradients = self  # type: ignore[attr-defined]
            if shard.name in self.hooks:
                self._call_hooks_of(p)
            if shard.sum_over > 1:
                self.partial.append(_Partial(p, shard, self.groups[shard.sum_over]))
            if shard.split.dim is None and (shard.split.state != R or shard.check_gradient):
                self._full.append(p)
            if shard.split.state is None:
                self._undecided.append(p)
            if not shard.fsdp and shard.mesh[DATA_PARALLEL].size() > 1:
                self._averaged.append(p)
                self._begin_at(p)
                self._data_parallel = shard.mesh.get_group(DATA_PARALLEL)

    def add_hook(self, p: torch.nn.Parameter, hook: Callable[..., Any], *, accumulated: bool = False) -> RemovableHandle:
        """Call a user's hook with the full gradient of each pass; with `accumulated`, with the parameter, once its gradient is complete."""
        shard: ParamShard = p._tp_shard  # type: ignore[attr-defined]
        if (found := self.hooks.get(shard.name)) is None:
            found = self.hooks[shard.name] = UserHooks(OrderedDict(), OrderedDict())
            self._call_hooks_of(p)
        hooks = found.accumulated if accumulated else found.gradient
        handle = RemovableHandle(hooks)
        hooks[handle.id] = hook
        return handle

    def _call_hooks_of(self, p: torch.nn.Parameter) -> None:
        shard: ParamShard = p._tp_shard  # type: ignore[attr-defined]
        self._hooked.append((p, self.hooks[shard.name]))
        self._begin_at(p)

    def _begin_at(self, p: torch.nn.Parameter) -> None:
        """Begin a pass when a gradient of `p` is there, if it has not begun before."""
        if not isinstance(p, DTensor) and p.requires_grad and "_tp_begin" not in p.__dict__:
            p._tp_begin = Tensor.register_hook(p, _begin_of(ref(self)))  # type: ignore[attr-defined]

    def add_equal(self, p: torch.nn.Parameter, grad: Tensor) -> None:
        """Add this local gradient, which is equal on all ranks, at the end of the pass: whether others of `p` are terms is not known yet."""
        self._equal[p] = self._equal[p] + grad if p in self._equal else grad

    def grads_of(self, inputs: Sequence[Any], run: Callable[[], Sequence[Tensor | None]]) -> list[Tensor | None]:
        """Return the complete local gradients that `run`, a call of `torch.autograd.grad`, computes for `inputs`."""
        self._returning = True
        try:
            found = list(run())
        finally:
            self._returning = False
        for i, (x, g) in enumerate(zip(inputs, found, strict=True)):
            shard: ParamShard | None = getattr(x, "_tp_shard", None)
            if shard is None or g is None:
                continue
            undecided = shard.split.state is None and self._differs(g)
            if undecided or shard.sum_over > 1:
                found[i] = g = g.clone(memory_format=torch.contiguous_format)
                term = g if undecided else shard.summed_part(g)
                _sum_over(self.groups[self.axis.size if undecided else shard.sum_over], [term])
            if shard.name in self.hooks:
                found[i] = self.hooks[shard.name].changed(g, shard)
        return found

    def _differs(self, grad: Tensor) -> bool:
        low, high = self._over_ranks(_signature(grad).unsqueeze(0).to(grad.device))
        return float((high - low).max()) > TOLERANCE * float(high[0, 0].clamp_min(1e-12))

    def begin(self) -> None:
        """Begin a backward pass; called at every collective of it, so cheap."""
        if self._pass() is not None:
            return
        with local_view():
            set_aside = [] if self._returning else self._set_aside()
        this_pass = _BackwardPass(self, set_aside, returning=self._returning)
        self._pass = ref(this_pass)
        queue_after_backward(this_pass.finish_after_fsdp if self._sharded else this_pass.finish)

    def _set_aside(self) -> list[tuple[torch.nn.Parameter, Tensor]]:
        """Take away the gradients that earlier passes have summed already."""
        partial = [x.parameter for x in self.partial]
        others = {id(p): p for p in (*partial, *(p for p, _ in self._hooked), *self._averaged)}
        found = [(p, p.grad) for p in others.values() if p.grad is not None]
        if self._deferred and found:
            return []  # they are terms, as those of this pass will be
        self._deferred = self.defer and not found
        for parameter, _ in found:
            parameter.grad = None
        return found

    @local_view()
    def end(self, summed_before: list[tuple[torch.nn.Parameter, Tensor]]) -> None:
        """End a backward pass: sum what is partial, then add what earlier passes had summed."""
        if self.defer and self._deferred:
            return
        self._deferred = False
        with torch.no_grad():
            self._compare_with_plan()
            by_group: dict[Any, list[Tensor]] = defaultdict(list)
            for x in self.partial:
                if x.parameter.grad is not None:
                    term = x.term()
                    by_group[x.group, term.dtype].append(term)
            for (group, _), terms in by_group.items():
                _sum_over(group, terms)
            for p in self._averaged:
                if p.grad is not None:
                    _sum_over(self._data_parallel, [p.grad.div_(self._data_parallel.size())])
            self._add_equal_gradients()
            for p, hooks in self._hooked:
                hooks.call_with_gradient(p)
            for parameter, before in summed_before:
                if parameter.grad is None:
                    parameter.grad = before
                else:
                    local_tensor(parameter.grad).add_(local_tensor(before))
            for p, hooks in self._hooked:
                hooks.call_with_parameter(p)
        self.passes += 1

    def _add_equal_gradients(self) -> None:
        for p, grad in self._equal.items():
            if p.grad is None:
                p.grad = like(p, grad)
            else:
                local_tensor(p.grad).add_(grad)
        self._equal.clear()

    def _compare_with_plan(self) -> None:
        """Compare the gradients of full parameters over the ranks: are they equal (`I`) or terms of a sum (`R`), as the plan says?

        Where the plan leaves it open, this decides it.
        """
        looked_at = self._full if self.passes < CHECKED_PASSES else self._undecided
        looked_at = [p for p in looked_at if p.requires_grad]
        if not looked_at:
            return
        low, high = self._over_ranks(torch.stack([_signature(p.grad) for p in looked_at]).to(looked_at[0].device))
        smallest, largest = low[:, 0], high[:, 0]
        matters, some = largest > 1e-9 * largest.max(), TOLERANCE * largest.clamp_min(1e-12)
        unequal = ((largest - smallest > some) & matters).tolist()
        decided = {}
        for i, p in enumerate(looked_at):
            shard: ParamShard = p._tp_shard  # type: ignore[attr-defined]
            if shard.split.state is None:
                spread = float((high[i] - low[i]).max())
                decided[p] = None if not largest[i] else R if spread > some[i] else I
            elif shard.split.state == I and unequal[i]:
                raise TPError(
                    f"`{shard.name}` is replicated, but its gradient is not the same on all tp={self.axis.size} ranks (norms from "
                    f"{smallest[i]:.4g} to {largest[i]:.4g}): it works on sharded activations. Give it the style `sequence` if it runs on "
                    "shards of the sequence, else Replicate(state='R'), and its gradients are summed."
                )
            elif shard.split.state == R and smallest[i] == largest[i] > 0:
                raise TPError(
                    f"`{shard.name}`: the plan says that its gradient is partial, but all tp={self.axis.size} ranks have the same one (norm "
                    f"{largest[i]:.4g}): summing would make it {self.axis.size} times too large. Give it the style Replicate(state='I')."
                )
        if decided:
            self._decide(decided)

    def _over_ranks(self, mine: Tensor) -> tuple[Tensor, Tensor]:
        """(smallest, largest) of every number over the ranks of the axis."""
        every = mine.new_empty((self.axis.size * mine.shape[0], mine.shape[1]))
        all_gather_into(every, mine.contiguous(), self.axis.group)
        every = every.view(self.axis.size, *mine.shape)
        return every.amin(0), every.amax(0)

    def _decide(self, states: dict[torch.nn.Parameter, Any]) -> None:
        """Fix the states of parameters that the plan left open; equal on all data-parallel ranks, and so on the whole mesh."""
        first = next(iter(states))
        shard: ParamShard = first._tp_shard  # type: ignore[attr-defined]
        codes = torch.tensor([{None: 0, I: 1, R: 2}[s] for s in states.values()], device=first.device)
        dist.all_reduce(codes, dist.ReduceOp.MAX, group=shard.mesh.get_group(DATA_PARALLEL))
        for p, code in zip(states, codes.tolist(), strict=True):
            shard = p._tp_shard  # type: ignore[attr-defined]
            p._tp_shard = replace(shard, split=replace(shard.split, state=(None, I, R)[code]))  # type: ignore[attr-defined]
        self.watch(self.parameters)


class _BackwardPass:
    """One backward pass, kept alive by the callback that autograd calls when it is over."""

    def __init__(
        self, gradients: PartialGradients, summed_before: list[tuple[torch.nn.Parameter, Tensor]], *, returning: bool
    ) -> None:
        self._gradients = gradients
        self._returning = returning  # nothing is accumulated
        self._summed_before = summed_before

    def finish_after_fsdp(self) -> None:
        """Finish behind FSDP2's own callback, which reduces gradients, and may have been queued after this one."""
        queue_after_backward(self.finish)

    def finish(self) -> None:
        self._gradients._pass = lambda: None
        if not self._returning:
            self._gradients.end(self._summed_before)


def _signature(grad: Tensor | None) -> Tensor:
    """(norm, two random projections) of a gradient: equal on two ranks only if the gradients are."""
    if grad is None:
        return torch.zeros(3, dtype=torch.float64)
    grad = local_tensor(grad).detach().double().flatten().cpu()
    signs = torch.randint(0, 2, (2, grad.numel()), generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1).double()
    return torch.cat((grad.norm().unsqueeze(0), signs @ grad))


@contextmanager
def no_sync(model: torch.nn.Module) -> Iterator[None]:
    """Accumulate gradients without communication, as the `no_sync` of DDP: a later pass outside of this context sums them all.

    On the data-parallel axis FSDP2 leaves out its reduce-scatter, and so keeps unsharded gradients until then. In between, `.grad` is of this
    rank's data alone, or None.

    Example:
        >>> with no_sync(torch.nn.Linear(2, 2)):
        ...     pass
    """
    from torch.distributed.fsdp import FSDPModule

    adopted: Any = next((m.__dict__["_tp_registry"] for m in model.modules() if "_tp_registry" in m.__dict__), None)
    gradients: PartialGradients | None = adopted.gradients if adopted is not None else None
    sharded = gradients is None or any(p._tp_shard.fsdp for p in gradients.parameters[:1])  # type: ignore[attr-defined]
    units = [m for m in model.modules() if isinstance(m, FSDPModule)] if sharded else []
    try:
        for unit in units:
            unit.set_requires_gradient_sync(False, recurse=False)
        if gradients is not None:
            gradients.defer = True
        yield
    finally:
        for unit in units:
            unit.set_requires_gradient_sync(True, recurse=False)
        if gradients is not None:
            gradients.defer = False


def _sum_over(group: dist.ProcessGroup, grads: list[Tensor]) -> None:
    """Sum each of these gradients over the group, in place, in one all-reduce."""
    if len(grads) == 1 and grads[0].is_contiguous():
        group.allreduce(grads).wait()
        return
    flat = flatten(grads)
    group.allreduce([flat]).wait()
    foreach_copy_(grads, unflatten(flat, grads))
