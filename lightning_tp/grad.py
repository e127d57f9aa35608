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
from functools import lru_cache
from typing import Any
from weakref import WeakSet, ref

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_tp._compat import asked_by, flatten, local_tensor, queue_after_backward, unflatten, wrap_total_norm
from lightning_tp.border import Shard
from lightning_tp.comm import Axis
from lightning_tp.errors import TPError

CHECKED_PASSES = 1  # gradients of whole parameters are compared over ranks in the first backward pass
TOLERANCE = 1e-2


@dataclass
class _Share:
    """A parameter whose gradient is this rank's share, and the ranks that hold the others."""

    parameter: torch.nn.Parameter
    shard: Shard
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
        self.whole: list[tuple[torch.nn.Parameter, Shard]] = []
        self.passes = 0
        self._pass: Callable[[], object] = lambda: None  # weak: autograd lets go of the callback of a pass that fails, too
        self._before: list[tuple[torch.nn.Parameter, Tensor]] = []
        self.later = False  # see `unsummed`
        self._pending = False  # gradients of the passes before are not summed yet
        axis.on_backward = self.begin

    def watch(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Look after these parameters from now on, and no others."""
        self.parameters = list(parameters)
        self.shares, self.whole = [], []
        for p in self.parameters:
            shard = p._ltp  # type: ignore[attr-defined]
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
            asked = asked_by(parameter)
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
def unsummed(model: torch.nn.Module) -> Iterator[None]:
    """Let backward passes keep what is to be summed over ranks, for a later pass outside this context to sum it all: accumulation.

    On the data-parallel axis FSDP2 leaves out its reduce-scatter, and so keeps unsharded gradients until then. In between, `.grad` is of this
    rank's data alone, or None. Counterpart of the `no_sync` of DDP.

    Example:
        >>> with unsummed(torch.nn.Linear(2, 2)):
        ...     pass
    """
    from torch.distributed.fsdp import FSDPModule

    adopted: Any = next((m.__dict__["_ltp_adopt"] for m in model.modules() if "_ltp_adopt" in m.__dict__), None)
    gradients: PartialGradients | None = adopted.gradients if adopted is not None else None
    sharded = gradients is None or any(p._ltp.fsdp for p in gradients.parameters[:1])  # type: ignore[attr-defined]
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


# ---------------------------------------------------------------------------------------------------------------- norms

_applied: WeakSet[PartialGradients] = WeakSet()  # of the models that live; weak references to parameters would pin them


def register(gradients: PartialGradients) -> None:
    """Let `torch.nn.utils.clip_grad_norm_`, however it was imported, take the norm of the whole gradients of these."""
    _applied.add(gradients)
    wrap_total_norm(_norm_of_applied)


def _norm_of_applied(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def get_total_norm(
        tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
    ) -> Tensor:
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        of = {id(p.grad): p._ltp for gradients in _applied for p in gradients.parameters}  # type: ignore[attr-defined]
        known = [(of[id(t)], t) for t in tensors if id(t) in of]
        if not known:
            return own(tensors, norm_type, error_if_nonfinite, foreach)
        if len(known) != len(tensors):
            raise TPError(
                f"The norm is asked of {len(tensors)} gradients together, of which {len(known)} belong to a split model: clip the "
                "others by themselves."
            )
        return _whole_norm(known, norm_type, error_if_nonfinite)

    return get_total_norm


@torch.no_grad()
def grad_norm(parameters: Iterable[torch.nn.Parameter], norm_type: float = 2.0, *, error_if_nonfinite: bool = False) -> Tensor:
    """The norm of the whole gradients, as one process would have it: each element counted once; one all-reduce an axis.

    Args:
        parameters: of a model that `parallelize` was applied to.
        norm_type: p of the p-norm; `inf` for the largest element.
        error_if_nonfinite: raise if the norm is not finite.

    Returns:
        A scalar, equal on all ranks. torch's counterpart is `torch.nn.utils.get_total_norm`.
    """
    known = [(p._ltp, p.grad) for p in parameters if p.grad is not None]  # type: ignore[attr-defined]
    return _whole_norm(known, norm_type, error_if_nonfinite)


@torch.no_grad()
def grad_norms(module: torch.nn.Module, norm_type: float | str = 2.0, group_separator: str = "/") -> dict[str, Tensor]:
    """The norm of each parameter's whole gradient, and of all together: names and values that `grad_norm` of Lightning has in one process.

    `lightning.pytorch.utilities.grad_norm` does the same on a split model, through this. One all-reduce an axis for all of them.

    Args:
        module: that `parallelize` was applied to, or a part of it. Every rank has to ask.
        norm_type: p of the p-norm; `inf` for the largest element.
        group_separator: stands between "grad_2.0_norm" and the parameter's name.

    Example:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> {name: f"{norm:.3f}" for name, norm in grad_norms(layer).items()}
        {'grad_2.0_norm/weight': '1.414', 'grad_2.0_norm_total': '1.414'}
    """
    order = float(norm_type)
    if order <= 0:
        raise TPError(f"`norm_type={norm_type!r}`: give a number above 0, or 'inf'.")
    named = [(n, p, p.grad) for n, p in module.named_parameters() if p.grad is not None]
    if not named:
        return {}
    largest = order == float("inf")
    each, groups = [], {}
    for _, p, grad in named:
        shard = getattr(p, "_ltp", None)
        local = local_tensor(grad)
        parts = [(local, 1)] if shard is None else shard.parts_by_copies(local)
        norms = [(_norms([part], order)[0], copies) for part, copies in parts if part.numel()]
        zero = torch.zeros((), device=local.device, dtype=torch.float64 if local.dtype == torch.float64 else torch.float32)
        each.append(
            max((norm for norm, _ in norms), default=zero)
            if largest
            else sum((norm.pow(order) / copies for norm, copies in norms), zero)
        )
        groups.update({id(group): group for group in (() if shard is None else shard.groups) if group.size() > 1})
    total = torch.stack([t.to(each[0].dtype) for t in each])
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    for group in groups.values():
        group.allreduce([total], options).wait()
    all_together = total.max() if largest else total.sum().pow(1 / order)
    total = total if largest else total.pow(1 / order)
    found = {f"grad_{order}_norm{group_separator}{name}": norm for (name, _, _), norm in zip(named, total, strict=True)}
    return {**found, f"grad_{order}_norm_total": all_together}


@torch.no_grad()
def _whole_norm(gradients: list[tuple[Shard, Tensor]], norm_type: float, error_if_nonfinite: bool) -> Tensor:
    if not gradients:
        return torch.zeros(())
    parts: list[Tensor] = []
    shares: list[float] = []  # of an element that n ranks hold, each counts 1/n
    for shard, grad in gradients:
        if shard.split.sum_rows is None:
            parts.append(local_tensor(grad))
            shares.append(1 / shard.copies)
        else:
            for part, copies in shard.parts_by_copies(local_tensor(grad)):
                parts.append(part)
                shares.append(1 / copies)
    if norm_type == float("inf"):
        some = [part for part in parts if part.numel()] or [parts[0].new_zeros(1)]  # a rank may hold nothing
        total, op = _norms(some, norm_type).max(), dist.ReduceOp(dist.ReduceOp.MAX)
    else:
        norms = _norms(parts, norm_type)
        total, op = (
            torch.dot(norms.pow(norm_type), _vector(tuple(shares), norms.device, norms.dtype)),
            dist.ReduceOp(dist.ReduceOp.SUM),
        )
    options = dist.AllreduceOptions()
    options.reduceOp = op
    for group in gradients[0][0].groups:
        if group.size() > 1:
            group.allreduce([total], options).wait()
    norm = total if norm_type == float("inf") else total.pow(1.0 / norm_type)
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(f"The gradient norm of order {norm_type} is {float(norm)}: it can't be clipped.")
    return norm


def _norms(parts: list[Tensor], norm_type: float) -> Tensor:
    """The norm of each, as one float32 vector (float64 for float64)."""
    if len({t.dtype for t in parts}) == 1:
        half = parts[0].dtype in (torch.float16, torch.bfloat16)
        return torch.stack(torch._foreach_norm(parts, norm_type, dtype=torch.float32 if half else None))
    return torch.stack([torch.linalg.vector_norm(t, norm_type, dtype=torch.float32) for t in parts])


@lru_cache(maxsize=8)
def _vector(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """These numbers on the device; kept, since a model asks for the same ones at every step."""
    return torch.tensor(values, device=device, dtype=dtype)


@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.nn.Parameter | Iterable[torch.nn.Parameter], max_norm: float, norm_type: float = 2.0
) -> Tensor:
    """Scale all gradients in place so that their norm is at most `max_norm`; returns the norm before. See `grad_norm`.

    Counterpart of `torch.nn.utils.clip_grad_norm_` (which does the same on a split model, through this).
    """
    parameters = [parameters] if isinstance(parameters, torch.nn.Parameter) else parameters
    parameters = [p for p in parameters if p.grad is not None]
    norm = grad_norm(parameters, norm_type)
    if not parameters:
        return norm
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local_tensor(p.grad) for p in parameters], scale)  # type: ignore[arg-type]
    return norm
