"""Run a recorded call on the shards of the first and the last rank, and compare with the shards of its result.

Equal sizes do not prove that two dims lie beside each other, so what is to change in a call is tried before it is believed. Where it can't be
tried (no values, too many elements), it is believed for operators that treat all positions alike.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_tp._compat import enable_function_modes
from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.fake_world import FakeGroup
from lightning_tp.core.trees import tensors_in
from lightning_tp.infer.calls.layouts import Layouts, OnRanks, Sharded
from lightning_tp.infer.calls.local_sizes import PerRankInt, mapped, on_rank, plain
from lightning_tp.infer.calls.recorded_call import NotOnShards, RecordedCall
from lightning_tp.infer.calls.try_backward import check_backward
from lightning_tp.infer.follow.ops import BY_POSITION, MOVES, NOT_BROADCASTING, OPERANDS_STAY_WHOLE, PRODUCTS, TRIANGLES
from lightning_tp.styles.calls.call import Call, Operand
from lightning_tp.styles.calls.run_call import run_call

MOST_TRIED = 2**22  # elements of what a call is given and returns, above which it is not tried
MOST_IN_FUNCTION = 2**25  # the same for an `autograd.Function`, which is believed nothing
MOST_CUT = 3  # operands of one call that may turn out to be whole on each rank, although a size of theirs is that of the split dim


def fitting_operands(call: RecordedCall, change: Call, layouts: Layouts, tried: set[Any]) -> tuple[Operand, ...]:
    """Return the operands of a change with which the call is right on shards: all that are cut, or but for some.

    Raises:
        NotOnShards: if it is right with none of these.
    """
    cut = [i for i, o in enumerate(change.operands) if o.part is not None]
    first: NotOnShards | None = None
    for whole in itertools.chain.from_iterable(itertools.combinations(cut, n) for n in range(min(len(cut), MOST_CUT) + 1)):
        changed = (replace(o, part=None, beside=None) if i in whole else o for i, o in enumerate(change.operands))
        operands = tuple(o for o in changed if o.part is not None or o.enter)
        try:
            if not _is_right(call, replace(change, operands=operands), layouts, tried):
                _check_function_untried(call) if call.is_function else _check_untried(call)
            return operands
        except NotOnShards as no:
            first = first or no
    assert first is not None
    raise first


def _check_function_untried(call: RecordedCall) -> None:
    raise NotOnShards("an autograd.Function that can't be tried on shards")


def _check_untried(call: RecordedCall) -> None:
    """Raise `NotOnShards` for a call that could not be tried, and may well be another one on shards."""
    first = next((x for x in call.tensors if x.layout is not None), None)
    if first is None or not isinstance(first.layout, Sharded):
        return
    t, layout = first.tensor, first.layout
    if call.name in BY_POSITION and not (call.name in TRIANGLES and layout.dim < t.ndim - 2):
        raise NotOnShards("it depends on positions along the split dimension")
    if call.name in OPERANDS_STAY_WHOLE | PRODUCTS | NOT_BROADCASTING | MOVES:
        return
    # else operands have to lie beside each other, as those of a pointwise operation do
    others = [g.tensor for g in call.given if g.tensor is not t and g.tensor.ndim and g.facts.label is None]
    try:
        shape = torch.broadcast_shapes(t.shape, *(o.shape for o in others))
    except RuntimeError:
        shape = None
    as_broadcast = shape is not None and (not call.results or call.results[0].tensor.shape == shape)
    if not as_broadcast and any(o.numel() > 1 for o in others) and any(t.shape[layout.dim] in o.shape for o in others):
        raise NotOnShards("operands that do not broadcast, one of which has the size of the split dimension")


def _can_be_tried(tensors: list[OnRanks], most: int) -> bool:
    numels = [x.tensor.numel() for x in tensors]
    # of an empty tensor it is not known how it would lie on ranks
    return all(numels) and sum(numels) <= most and not any(isinstance(x.layout, str) for x in tensors)


def _is_right(call: RecordedCall, change: Call, layouts: Layouts, tried: set[Any]) -> bool:
    """Return whether the call could be tried; raise `NotOnShards` if its results on shards are not the shards of what it returned."""
    given = {id(t): call.before.get(id(t)) or OnRanks(t, layouts.of(t)) for t in (g.tensor for g in call.given)}
    results = [OnRanks(t, layouts.of(t)) for t in (*(r.tensor for r in call.results), *_written(call))]
    tensors = [*given.values(), *results]
    if not _can_be_tried(tensors, MOST_IN_FUNCTION if call.is_function else MOST_TRIED):
        return False
    with_enter, change = change, replace(change, operands=tuple(replace(o, enter=False) for o in change.operands))
    shapes = tuple((x.tensor.shape, x.layout) for x in given.values())
    key = call.func, change, shapes, repr(mapped((call.args, call.kwargs), _number))
    if key in tried and all(x.tensor.is_floating_point() for x in given.values()):
        return True  # in a block, or a run, before
    if any(x.tensor.is_meta for x in tensors):
        made = _with_values(call, layouts)
        if made is None:
            return False
        given = {i: OnRanks(made[0][i], x.layout) for i, x in given.items()}
        results = [OnRanks(t, x.layout) for t, x in zip(made[1], results, strict=True)]
    for rank in (0, call.tp - 1):
        _compare(rank, call, change, given, results)
    if call.is_function:
        check_backward(call, with_enter, given, layouts)
    tried.add(key)
    return True


def _written(call: RecordedCall) -> list[Tensor]:
    """Return the tensor that a call writes into, if it does."""
    return [g.tensor for g in call.given[:1] if id(g.tensor) in call.before]


def _with_values(call: RecordedCall, layouts: Layouts) -> tuple[dict[int, Tensor], list[Tensor]] | None:
    """Return what a call on the meta device is given, with random values where none are known, and its results; None if it can't run."""
    values = {id(g.tensor): _value(g.tensor, layouts) for g in call.given}
    known = {i: t for i, t in values.items() if t is not None}
    copies = {i: t.clone() for i, t in known.items()}
    try:
        with enable_function_modes():  # for the mode that turns dropout off, around the recorder
            out = call.func(*plain(_with(call.args, copies)), **plain(_with(call.kwargs, copies)))
    except Exception:  # it may mix them with tensors that have no values
        return None
    results = [*tensors_in(out, depth=0), *(copies[id(t)] for t in _written(call))]
    return None if len(known) < len(values) or any(t.is_meta for t in results) else (known, results)


def _value(t: Tensor, layouts: Layouts) -> Tensor | None:
    known = layouts.tracer.value(t)
    if known is not None or not (t.is_floating_point() or t.is_complex()):
        return known
    return torch.rand(t.shape, dtype=torch.float32).to(t.dtype)


def _compare(rank: int, call: RecordedCall, change: Call, given: dict[int, OnRanks], expected: list[OnRanks]) -> None:
    """Run a changed call on the shards of one rank; raise `NotOnShards` if that fails, or gives other shards than expected."""
    shards = {i: x.shard(rank).clone() for i, x in given.items()}
    args, kwargs = (on_rank(_with(x, shards), rank) for x in (call.args, call.kwargs))
    try:
        with enable_function_modes():
            out = run_call(change, call.func, args, kwargs, Axis(FakeGroup(rank, call.tp)))
    except Exception as error:
        raise NotOnShards(f"it does not run on shards ({type(error).__name__})") from error
    got = [*tensors_in(out, depth=0), *(shards[id(t)] for t in _written(call))]
    if len(got) != len(expected) or not all(_same(a, b.shard(rank)) for a, b in zip(got, expected, strict=True)):
        raise NotOnShards("its result on shards is another one")


def _with(x: Any, tensors: dict[int, Tensor]) -> Any:
    """Return arguments with other tensors instead of these."""
    return mapped(x, lambda t: tensors.get(id(t), t) if isinstance(t, Tensor) else t)


def _number(x: Any) -> Any:
    """Return an argument for comparison; None for a tensor."""
    return None if isinstance(x, Tensor) else (x.whole, *x.local) if isinstance(x, PerRankInt) else x


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal up to rounding."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.detach(), b.detach()
    if torch.equal(a, b):  # most are, bit by bit
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return False
    finite = b.isfinite()
    scale = float(b[finite].abs().max()) if bool(finite.any()) else 0.0
    tolerance = 0.05 if a.dtype in (torch.bfloat16, torch.float16) else 1e-3
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
