"""Calls of torch functions as the recorder hands them to the rules. No tests here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_tp.core.trees import tensors_in
from lightning_tp.infer.calls.layouts import Layout, OnRanks, Sharded
from lightning_tp.infer.calls.local_sizes import plain
from lightning_tp.infer.calls.recorded_call import Given, RecordedCall, tensors_given
from lightning_tp.infer.follow.trace import ParamView, TensorFacts
from lightning_tp.styles.split import Ownership


def sharded(dim: int, *runs: tuple[int, int]) -> Sharded:
    """`sharded(1, (0, 4), (1, 4))`: dim 1 has four indices of rank 0, then four of rank 1."""
    return Sharded(dim, Ownership(runs))


def halves(dim: int, length: int = 8) -> Sharded:
    return sharded(dim, (0, length // 2), (1, length // 2))


def recorded(
    func: Any,
    *args: Any,
    layouts: dict[Any, Layout] | None = None,
    results: Layout | tuple[Layout, ...] = None,
    split: tuple[Any, ...] = (),
    equal: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    **fields: Any,
) -> RecordedCall:
    """A call that has run, on two ranks.

    Args:
        func: is called.
        args: of it.
        layouts: path of an operand (or its position) -> how it lies on the ranks.
        results: the same of what comes out; one for all, or one for each.
        split: paths of split parameters.
        equal: paths of operands whose gradient is equal on all ranks.
        kwargs: of the function.
        fields: of `RecordedCall`.
    """
    kwargs = kwargs or {}
    given = []
    for path, t in tensors_given(args, kwargs):
        where = path if len(path) > 1 else path[0]
        layout = (layouts or {}).get(where)
        label = None if layout is None else torch.ones((), dtype=torch.int64).expand(t.shape)
        param = ParamView("w", ()) if where in split else None
        given.append(Given(t, layout, path, TensorFacts(label, param, True), where in split, where in equal, False))
    before = {id(g.tensor): OnRanks(g.tensor.clone(), g.layout) for g in given}
    outs = list(tensors_in(func(*plain(args), **plain(kwargs)), depth=0))
    of_results = results if isinstance(results, tuple) and not isinstance(results, Sharded) else (results,) * len(outs)
    defaults: dict[str, Any] = {
        "site": (("forward", "1:2-3:4"),),
        "module": "",
        "before": before if func.__name__.endswith("_") or func.__name__ == "__setitem__" else {},
        "products": (),
        "vocabulary": None,
        "partial_results": False,
        "tp": 2,
    }
    placed = tuple(OnRanks(t, x) for t, x in zip(outs, of_results, strict=True))
    return RecordedCall(func.__name__, func, args, kwargs, given=tuple(given), results=placed, **{**defaults, **fields})


class LayoutsOf:
    """In place of `Layouts`: those that a recorded call was made with."""

    def __init__(self, call: RecordedCall) -> None:
        self.layouts = {id(x.tensor): x.layout for x in call.tensors}
        self.tracer = self

    def of(self, t: Tensor) -> Layout:
        return self.layouts[id(t)]

    def value(self, t: Tensor) -> Tensor | None:
        return None if t.is_meta else t
