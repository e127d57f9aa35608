"""What an optimizer keeps and needs for a while, found by letting it take steps on the meta device, one for each shape."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lightning_tp.errors import TPError
from lightning_tp.estimate.rank.rank_model import LocalParam

OptimizerLike = str | type[torch.optim.Optimizer] | Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Steps = dict[tuple[tuple[int, ...], torch.dtype, bool, Any], tuple[int, int, int]]  # what a step of one parameter costs
KNOWN: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adafactor": torch.optim.Adafactor,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}


@dataclass(frozen=True)
class OptimizerCost:
    """What an optimizer costs a rank, in bytes.

    Args:
        state: kept from step to step.
        scratch: most that one step needs beside it.
        traffic: read and written by a step.
    """

    state: int
    scratch: int
    traffic: int


def known_optimizer(optimizer: OptimizerLike) -> Callable[..., Any]:
    """What makes it, of a list of parameters.

    Raises:
        TPError: for a name that is not known.
    """
    make = KNOWN.get(optimizer.lower()) if isinstance(optimizer, str) else optimizer
    if make is None:
        raise TPError(
            f"`optimizer={optimizer!r}`: there are {', '.join(KNOWN)}, or a class, or a function of a list of parameters."
        )
    return make


def optimizer_cost(
    optimizer: OptimizerLike, held: Iterable[LocalParam], *, together: bool, known: Steps | None = None
) -> OptimizerCost:
    """For these parameters.

    Args:
        optimizer: a name, a class, or a function of a list of parameters.
        held: those that have a gradient.
        together: parameters are updated together (`foreach`, the default on a GPU), and not one after the other.
        known: steps that have been looked at before; more are added.

    Raises:
        TPError: for an unknown name, or an optimizer that can't take a step on these.
    """
    make = known_optimizer(optimizer)
    state = scratch = traffic = 0
    known = {} if known is None else known
    for (shape, dtype), n in Counter((h.local_shape, h.dtype) for h in held).items():
        key = (shape, dtype, together, make)
        if key not in known:
            known[key] = _one(make, shape, dtype, together)
        kept, needed, moved = known[key]
        state += n * kept
        traffic += n * moved
        scratch = scratch + n * needed if together else max(scratch, needed)
    return OptimizerCost(state, scratch, traffic)


def _one(make: Callable[..., Any], shape: tuple[int, ...], dtype: torch.dtype, together: bool) -> tuple[int, int, int]:
    p = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
    p.grad = torch.empty_like(p)
    try:
        optimizer = make([p])
        for group in optimizer.param_groups:
            if together and "foreach" in group and group["foreach"] is None and not group.get("fused"):
                group["foreach"] = True
        optimizer.step()
        p.grad = torch.empty_like(p)
        with _Scratch() as scratch:
            optimizer.step()
    except Exception as error:
        raise TPError(
            f"The optimizer can't take a step on a parameter of shape {shape} without values: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}. Give the name of one that is like it (`optimizer='adamw'`)."
        ) from error
    tensors = [t for t in tree_flatten(list(optimizer.state.values()))[0] if isinstance(t, Tensor)]
    size = p.numel() * p.itemsize
    kept = sum(t.untyped_storage().nbytes() for t in {id(t): t for t in tensors}.values() if t.is_meta)
    return kept, scratch.most, 3 * size + 2 * kept + (4 * scratch.most if together else 0)


class _Scratch(TorchDispatchMode):
    """Bytes of tensors that are made, while they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_flatten((args, kwargs or {}))[0] if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_flatten(out)[0]:
            if isinstance(t, Tensor) and t.is_meta and t.untyped_storage()._cdata not in given | self.seen:
                storage = t.untyped_storage()
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size
