"""Gradients of parameters: shares summed over ranks once a backward pass, the norm over both axes, clipping.

A whole parameter that works on sharded activations (a norm on this rank's tokens, a bias added to them, key/value heads that
ranks share) gets a share of its gradient on each rank. Autograd functions in `comm.py` tell when a backward pass begins; when it is
over, all shares are summed in one all-reduce (and one more for each group of ranks that share heads), so that `.grad` is right
as soon as `loss.backward()` returns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_tp._compat import backward_kind, flatten, local_tensor, queue_after_backward, unflatten
from lightning_tp.core.comm.axis import Axis
from lightning_tp.errors import TPError
from lightning_tp.shards.shard import ParamShard

CHECKED_PASSES = 1  # gradients of whole parameters are compared over ranks in the first backward pass


TOLERANCE = 1e-2


@dataclass
class _Share:
    """A parameter whose gradient is this rank's share, and the ranks that hold the others."""

    parameter: torch.nn.Parameter
    shard: ParamShard
    group: dist.ProcessGroup

    def mine(self) -> Tensor:
        """The part of the gradient that is a share, as a view."""
        assert self.parameter.grad is not None
        return self.shard.summed_part(local_tensor(self.parameter.grad))


class PartialGradients:
    """Sums the shares of gradients at the end of each backward pass.

    Gradients that an earlier pass has summed (accumulation over micro-batches) are set aside while a pass runs, and added to its own
    afterwards: so only what is new is summed.

    Args:
        axis: the tensor-parallel axis; its `on_backward` is set to `begin`.
        groups: for `Split.sum_over`, the group of ranks that this rank sums with.
    """

    def __init__(self, axis: Axis, groups: dict[int, dist.ProcessGroup]) -> None:
        self.axis = axis
        self.groups = groups
        self.parameters: list[torch.nn.Parameter] = []
        self.shares: list[_Share] = []
        self.whole: list[tuple[torch.nn.Parameter, ParamShard]] = []
        self.passes = 0
        self._pass: Callable[[], object] = lambda: None  # weak: autograd lets go of the callback of a pass that fails, too
        self._before: list[tuple[torch.nn.Parameter, Tensor]] = []
        self.later = False  # see `no_sync`
        self._pending = False  # gradients of the passes before are not summed yet
        axis.on_backward = self.begin

    def watch(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Look after these parameters from now on, and no others."""
        self.parameters = list(parameters)
        self.shares, self.whole = [], []
        for p in self.parameters:
            shard = p._tp_shard  # type: ignore[attr-defined]
            if shard.split.sum_over > 1:
                self.shares.append(_Share(p, shard, self.groups[shard.split.sum_over]))
            elif shard.split.dim is None:
                self.whole.append((p, shard))

    def begin(self) -> None:
        """The first collective of a backward pass; cheap, since it is called at every one."""
        if self._pass() is not None:
            return
        self._refuse_to_return_shares()
        self._before.clear()
        found = any(share.parameter.grad is not None for share in self.shares)
        self._pending = found and self._pending  # else somebody has thrown them away
        if not self._pending:
            self._pending = self.later and not found
            for share in self.shares if found else ():
                if share.parameter.grad is not None:
                    self._before.append((share.parameter, share.parameter.grad))
                    share.parameter.grad = None
        finish = self.finish
        self._pass = ref(finish)
        queue_after_backward(finish)

    def _refuse_to_return_shares(self) -> None:
        """`torch.autograd.grad` gives its gradients back before the pass is over: they can't be summed."""
        for share in self.shares:
            parameter = share.parameter
            if share.shard.fsdp or not parameter.requires_grad:
                continue
            asked = backward_kind(parameter)
            if asked == "backward":  # and so for all: one look a pass
                return
            if asked == "grad":
                raise TPError(
                    f"`torch.autograd.grad` is asked for the gradient of `{share.shard.name}`, of which each of the tp={self.axis.size} ranks "
                    "has a share: it would be given back before the shares are summed. Call `loss.backward(inputs=[..])` instead, and "
                    "take `.grad`."
                )

    def finish(self) -> None:
        """The end of a backward pass."""
        self._pass = lambda: None
        if self.later and self._pending:
            return
        self._pending = False
        with torch.no_grad():
            if self.passes < CHECKED_PASSES:
                self._check()
            by_group: dict[Any, list[Tensor]] = defaultdict(list)
            for share in self.shares:
                if share.parameter.grad is not None:
                    mine = share.mine()
                    by_group[share.group, mine.dtype].append(mine)
            for (group, _), grads in by_group.items():
                _sum_over(group, grads)
            for parameter, before in self._before:
                if parameter.grad is None:
                    parameter.grad = before
                else:
                    local_tensor(parameter.grad).add_(local_tensor(before))
        self._before.clear()
        self.passes += 1

    def _check(self) -> None:
        """Compare over the ranks what the plan says is equal, and what it says is not: it may be wrong about either."""
        said = [(p, s, False) for p, s in self.whole] + [
            (x.parameter, x.shard, True) for x in self.shares if x.shard.may_be_whole and x.shard.split.dim is None
        ]
        said = [(p, s, partial) for p, s, partial in said if p.requires_grad]
        if not said:
            return
        zero = torch.zeros((), dtype=torch.float64)
        norms = [zero if p.grad is None else local_tensor(p.grad).double().norm().cpu() for p, _, _ in said]
        mine = torch.stack(norms).to(said[0][0].device)
        every = mine.new_empty((self.axis.size, len(said)))
        self.axis.group._allgather_base(every, mine.unsqueeze(0)).wait()
        low, high = every.min(0).values, every.max(0).values
        differ = ((high - low) > TOLERANCE * high.clamp_min(1e-12)) & (high > 1e-9 * high.max())
        equal = (high == low) & (high > 0)
        for (_, shard, partial), unequal, same, lo, hi in zip(
            said, differ.tolist(), equal.tolist(), low.tolist(), high.tolist(), strict=True
        ):
            if unequal and not partial:
                raise TPError(
                    f"`{shard.name}` is whole on every rank, but its gradient is not the same on all tp={self.axis.size} ranks (norms "
                    f"from {lo:.4g} to {hi:.4g}): it works on activations of which each rank has a share. Give it the style "
                    "`sequence` if these are the tokens, else Replicate(partial_grad=True), and its shares are summed."
                )
            if same and partial:
                raise TPError(
                    f"`{shard.name}`: the plan says that each rank has a share of its gradient, but all tp={self.axis.size} ranks have the "
                    f"same (norm {hi:.4g}): summing would make it {self.axis.size} times too large. Give it the style "
                    "Replicate(partial_grad=False)."
                )


@contextmanager
def no_sync(model: torch.nn.Module) -> Iterator[None]:
    """Let backward passes keep what is to be summed over ranks, for a later pass outside this context to sum it all: accumulation.

    On the data-parallel axis FSDP2 leaves out its reduce-scatter, and so keeps unsharded gradients until then. In between, `.grad` is of this
    rank's data alone, or None. Counterpart of the `no_sync` of DDP.

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
            gradients.later = True
        yield
    finally:
        for unit in units:
            unit.set_requires_gradient_sync(True, recurse=False)
        if gradients is not None:
            gradients.later = False


def _sum_over(group: dist.ProcessGroup, grads: list[Tensor]) -> None:
    """Sum each of these over the group, in place, in one all-reduce."""
    if len(grads) == 1 and grads[0].is_contiguous():
        group.allreduce(grads).wait()
        return
    flat = flatten(grads)
    group.allreduce([flat]).wait()
    torch._foreach_copy_(grads, unflatten(flat, grads))
