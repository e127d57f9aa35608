"""Run an `autograd.Function` of a user on the shards of every rank, forward and backward: it may stay as it is only if both are right.

What its backward does can't be followed: it may reduce over a shard, compute again with sizes of its own, or make a gradient by itself. It is tried
with random gradients, of several magnitudes and zero. Gradients of sharded inputs have to be shards of the full gradient; those of which
each rank computes a part have to add up to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_tp._compat import enable_function_modes
from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.fake_world import FakeGroup
from lightning_tp.core.trees import tensors_in
from lightning_tp.infer.calls.layouts import Layouts, OnRanks, Sharded
from lightning_tp.infer.calls.local_sizes import mapped, on_rank, plain
from lightning_tp.infer.calls.recorded_call import Given, NotOnShards, RecordedCall
from lightning_tp.infer.follow.features import gradient_is_partial
from lightning_tp.styles.calls.call import Call
from lightning_tp.styles.calls.run_call import run_call

MAGNITUDES = (0.0, 1.0, 1e4)  # of the gradients
Gradients = dict[int, Tensor]  # id of an input -> its gradient


def check_backward(call: RecordedCall, change: Call, given: Mapping[int, OnRanks], layouts: Layouts) -> None:
    """Raise `NotOnShards` if the gradients that the call's backward gives on ranks are not those of one process.

    Args:
        change: of the call.
        given: id of each tensor that the call is given -> the tensor, with values, and its layout.
        layouts: of the run.
    """
    inputs = {id(g.tensor): g for g in call.given if g.tensor.is_floating_point() and (g.facts.grad or g.facts.param is not None)}
    generator = torch.Generator().manual_seed(0)
    results = [x for x in call.results if x.tensor.is_floating_point()]
    partial_results = [gradient_is_partial(layouts.tracer.shadow(x.tensor).label) for x in results]
    weights = torch.rand(call.tp, generator=generator) + 0.5  # of the part that each rank has of a gradient
    weights /= weights.sum()
    for magnitude in MAGNITUDES:
        full = [torch.randn(x.tensor.shape, generator=generator).to(x.tensor.dtype) * magnitude for x in results]
        expected = _gradients(call, change, inputs, {i: x.tensor for i, x in given.items()}, full, None)
        of_ranks = []
        for rank in range(call.tp):
            local = [
                g * weights[rank] if partial else OnRanks(g, x.layout).shard(rank)
                for g, x, partial in zip(full, results, partial_results, strict=True)
            ]
            of_ranks.append(_gradients(call, change, inputs, {i: x.shard(rank) for i, x in given.items()}, local, rank))
        for i, g in inputs.items():
            _check_gradient(call, change, g, given[i], expected[i], [of_rank[i] for of_rank in of_ranks])


def _gradients(
    call: RecordedCall,
    change: Call,
    inputs: Iterable[int],
    tensors: Mapping[int, Tensor],
    gradients: list[Tensor],
    rank: int | None,
) -> Gradients:
    """Return the gradients of inputs for these gradients of the results, in one process or on a rank."""
    leaves = {i: t.detach().clone().requires_grad_(i in inputs) for i, t in tensors.items()}
    with torch.enable_grad(), enable_function_modes():
        passed = {i: t.clone() if t.requires_grad else t for i, t in leaves.items()}  # it may write into them
        args = mapped(call.args, lambda t: passed.get(id(t), t) if isinstance(t, Tensor) else t)
        try:
            if rank is None:
                out = call.func(*plain(args))
            else:
                out = run_call(change, call.func, on_rank(args, rank), {}, Axis(FakeGroup(rank, call.tp)))
            made = [t for t in tensors_in(out, depth=0) if t.is_floating_point()]
            pairs = [(t, g) for t, g in zip(made, gradients, strict=True) if t.requires_grad]
            wanted = [leaves[i] for i in inputs]
            ends, begins = zip(*pairs, strict=True) if pairs else ((), ())
            found = torch.autograd.grad(ends, wanted, begins, allow_unused=True) if pairs and wanted else [None] * len(wanted)
        except Exception as error:
            raise NotOnShards(f"its backward does not run on shards ({type(error).__name__})") from error
    return {i: torch.zeros_like(leaves[i]) if g is None else g for i, g in zip(inputs, found, strict=True)}


def _check_gradient(call: RecordedCall, change: Call, g: Given, given: OnRanks, expected: Tensor, of_ranks: list[Tensor]) -> None:
    if isinstance(given.layout, Sharded):
        right = all(_same(x, OnRanks(expected, given.layout).shard(rank)) for rank, x in enumerate(of_ranks))
    elif _is_partial(call, change, g):
        right = _same(torch.stack(of_ranks).sum(0), expected)
    else:
        right = all(_same(x, expected) for x in of_ranks)
    if not right:
        raise NotOnShards("its gradient on shards is another one")


def _is_partial(call: RecordedCall, change: Call, g: Given) -> bool:
    """Return whether each rank computes a part of the gradient of an input that all of them have whole."""
    if gradient_is_partial(g.facts.label) or any(o.path == g.path and o.enter for o in change.operands):
        return True
    return g.facts.param is not None and (call.partial_results or any(x.layout is not None or g.is_split for x in call.tensors))


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether two gradients are equal up to rounding; a zero one may give numbers that are none."""
    tolerance, finite = 0.05 if a.dtype in (torch.bfloat16, torch.float16) else 1e-3, b[b.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance * max(scale, 1e-6), equal_nan=True)
