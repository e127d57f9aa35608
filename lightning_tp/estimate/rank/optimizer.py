"""Find what an optimizer keeps and needs temporarily, by letting it step on the meta device, once for each shape of parameter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_tp._compat import storage_key
from lightning_tp.core.trees import tensors_in
from lightning_tp.errors import TPError
from lightning_tp.estimate.rank.rank_model import LocalParam
from lightning_tp.estimate.rank.settings import OptimizerLike
from lightning_tp.estimate.trace.step_trace import Alloc, Label
from lightning_tp.estimate.trace.storages import LiveStorages


@dataclass(frozen=True)
class OptimizerCost:
    """What the step of an optimizer costs, in bytes."""

    state: int  # kept from step to step
    scratch: int  # most that a step needs temporarily beside it
    traffic: int  # read and written by a step


# by shape and dtype of a parameter, whether steps are by foreach, and what makes the optimizer
StepCosts = dict[tuple[tuple[int, ...], torch.dtype, bool, Any], OptimizerCost]


KNOWN: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "adafactor": torch.optim.Adafactor,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}


def known_optimizer(optimizer: OptimizerLike) -> Callable[..., Any]:
    """Return a function of a list of parameters that makes the optimizer; `TPError` for an unknown name."""
    make = KNOWN.get(optimizer.lower()) if isinstance(optimizer, str) else optimizer
    if make is None:
        raise TPError(
            f"Unknown `optimizer={optimizer!r}`. Valid are {', '.join(KNOWN)}, a class, or a function of a list of parameters."
        )
    return make


def optimizer_cost(
    optimizer: OptimizerLike, params: Iterable[LocalParam], *, foreach: bool, known: StepCosts | None = None
) -> OptimizerCost:
    """Return what a step on these parameters costs.

    Args:
        optimizer: a name, a class, or a function of a list of parameters.
        params: those that have a gradient.
        foreach: whether all are updated together (the default on a GPU), and not one after the other.
        known: costs that were found before; others are added.

    Raises:
        TPError: for an unknown name, or an optimizer that can't step on these.
    """
    make = known_optimizer(optimizer)
    state = scratch = traffic = 0
    known = {} if known is None else known
    for (shape, dtype), n in Counter((p.local_shape, p.dtype) for p in params).items():
        key = (shape, dtype, foreach, make)
        if key not in known:
            known[key] = _step_cost(make, shape, dtype, foreach)
        one = known[key]
        state += n * one.state
        traffic += n * one.traffic
        scratch = scratch + n * one.scratch if foreach else max(scratch, one.scratch)
    return OptimizerCost(state, scratch, traffic)


def _step_cost(make: Callable[..., Any], shape: tuple[int, ...], dtype: torch.dtype, foreach: bool) -> OptimizerCost:
    p = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
    p.grad = torch.empty_like(p)
    try:
        optimizer = make([p])
        for group in optimizer.param_groups:
            if foreach and "foreach" in group and group["foreach"] is None and not group.get("fused"):
                group["foreach"] = True
        optimizer.step()
        p.grad = torch.empty_like(p)
        with _TemporaryBytes() as temporary:
            optimizer.step()
    except Exception as error:
        raise TPError(
            f"The optimizer can't step on a parameter of shape {shape} on the meta device: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}. Pass the name of a similar one (`optimizer='adamw'`)."
        ) from error
    tensors = {id(t): t for t in tensors_in(list(optimizer.state.values()))}
    size = p.numel() * p.itemsize
    state = sum(t.untyped_storage().nbytes() for t in tensors.values() if t.is_meta)
    return OptimizerCost(state, temporary.most, 3 * size + 2 * state + (4 * temporary.most if foreach else 0))


class _TemporaryBytes(TorchDispatchMode):
    """Measures the bytes of new tensors while they are alive, and the `most` at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.storages = LiveStorages(self._changed, ())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage_key(t) for t in tensors_in((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for t in tensors_in(out):
            if t.is_meta and storage_key(t) not in given:
                self.storages.add(t, Label("", "backward"))
        self.most = max(self.most, self.now)
        return out

    def _changed(self, event: Alloc) -> None:
        self.now += event.change
