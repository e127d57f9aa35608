"""The conjugate pairs by hand: values, gradients, adjointness, and exactly what is sent."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.state import SEQUENCE, WIDTH, I, P, R, State
from lightning_tp.core.comm.transitions import transition, width_to_invariant
from lightning_tp.errors import TPError
from lightning_tp.testing import run_ranks
from tests.harness import Collectives, gradient_held, held

Pair = tuple[State, State]

# what the table of `transitions.py` promises: (arrives, wanted) -> (sent forward, sent backward)
SENT: dict[Pair, tuple[list[str], list[str]]] = {
    (I, R): ([], ["all-reduce"]),
    (SEQUENCE, R): (["all-gather"], ["reduce-scatter"]),
    (P, I): (["all-reduce"], []),
    (P, SEQUENCE): (["reduce-scatter"], ["all-gather"]),
    (I, SEQUENCE): ([], ["all-gather"]),
    (SEQUENCE, I): (["all-gather"], []),
    (WIDTH, I): (["all-gather"], []),
    (I, WIDTH): ([], ["all-gather"]),
}
LENGTHS, BATCHES, WIDTHS = (1, 16, 17, 197), (1, 3), (8, 341)


def function(pair: Pair, width: int) -> Callable[[Tensor, Axis], Tensor]:
    if pair == (WIDTH, I):
        return lambda x, axis: width_to_invariant(x, axis, width)
    found = transition(*pair)
    assert found is not None
    return found


def integers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small whole numbers: their sums are exact in bfloat16 too."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def strided(x: Tensor) -> Tensor:
    """The same values, not contiguous."""
    return x.transpose(0, -1).contiguous().transpose(0, -1) if x.ndim > 1 else x


def axis_of(seq_len: int | None = None) -> Axis:
    axis = Axis(dist.group.WORLD)
    axis.seq_len = seq_len
    return axis


def cases() -> Iterator[tuple[Pair, tuple[int, ...], torch.dtype, bool]]:
    shapes = [*itertools.product(BATCHES, LENGTHS, WIDTHS), (2, 17, 3, 5)]
    for pair, shape in itertools.product(SENT, shapes):
        yield pair, shape, torch.float32, False
        yield pair, shape, torch.bfloat16, True


def one(pair: Pair, shape: tuple[int, ...], dtype: torch.dtype, is_strided: bool) -> None:
    """One transition, forward and backward, against what a rank has to hold of the whole."""
    (arrives, wanted), axis = pair, axis_of(shape[1])
    rank, tp = axis.rank, axis.size
    whole, gradient = integers(*shape, seed=1, dtype=dtype), integers(*shape, seed=2, dtype=dtype)
    layout = strided if is_strided else lambda t: t
    # what is in the padding has to stay there: norms and biases fill it
    x = layout(held(whole, arrives, rank, tp, padding=1000.0)).requires_grad_()
    upstream = layout(gradient_held(gradient, wanted, rank, tp, padding=1000.0))
    before, upstream_before = x.detach().clone(), upstream.clone()

    with Collectives() as forward:
        y = function(pair, shape[-1])(x, axis)
    with Collectives() as backward:
        y.backward(upstream)

    assert y.dtype == dtype and torch.equal(y, held(whole, wanted, rank, tp)), f"forward: {tuple(y.shape)}"
    assert x.grad is not None
    assert torch.equal(x.grad, gradient_held(gradient, arrives, rank, tp)), f"backward: {tuple(x.grad.shape)}"
    assert y.is_contiguous() or y is x or is_strided, "code that calls `view` counts on it"
    assert torch.equal(x, before) and torch.equal(upstream, upstream_before), "an input was written to"

    dim = len(shape) - 1 if WIDTH in pair else 1
    padded = [tp * math.ceil(n / tp) if d == dim and pair not in WHOLE else n for d, n in enumerate(shape)]
    size = math.prod(padded) * dtype.itemsize
    assert forward.sent == [(kind, size) for kind in SENT[pair][0]], f"forward sends {forward.sent}"
    assert backward.sent == [(kind, size) for kind in SENT[pair][1]], f"backward sends {backward.sent}"


WHOLE = ((I, R), (P, I))  # an all-reduce needs no equal shards


@pytest.mark.parametrize("tp", [2, 4])
def test_every_transition_by_hand(tp: int) -> None:
    def body() -> None:
        for case in cases():
            try:
                one(*case)
            except Exception as e:
                raise AssertionError(f"{case}: {e}") from e

    run_ranks(body, tp)


def test_the_table_is_complete() -> None:
    named = {pair for pair in itertools.product((I, R, SEQUENCE, WIDTH, P), repeat=2)}
    for pair in named:
        if pair[0] == pair[1]:
            assert transition(*pair) is None
        elif pair in SENT and pair != (WIDTH, I):  # that one has to be told the width
            assert transition(*pair) is not None
        else:
            with pytest.raises(TPError, match=f"from {re.escape(str(pair[0]))} to {re.escape(str(pair[1]))}.*Go through I"):
                transition(*pair)
    with pytest.raises(TPError, match=r"'replicated'"):
        State.of("replicated")


@pytest.mark.parametrize("tp", [2, 4])
def test_backward_is_the_adjoint_of_forward(tp: int) -> None:
    """<f(x), g> = <x, f*(g)>, where a pairing counts each number of the whole activation once."""

    def body() -> None:
        generator = torch.Generator().manual_seed(0)  # alike on all ranks
        mine = torch.Generator().manual_seed(dist.get_rank())

        def value(shape: tuple[int, ...], state: str) -> Tensor:
            """Random, and possible in this state: equal on all ranks where the state says so."""
            equal = state in (I, R)
            return torch.randn(shape, generator=generator if equal else mine, dtype=torch.float64)

        def gradient(shape: tuple[int, ...], state: str) -> Tensor:
            equal = state in (I, P)
            return torch.randn(shape, generator=generator if equal else mine, dtype=torch.float64)

        def pairing(x: Tensor, g: Tensor, state: str) -> float:
            total = (x * g).sum()
            dist.all_reduce(total)
            return float(total) / (tp if state == I else 1)

        for (arrives, wanted), length, batch in itertools.product(SENT, LENGTHS, BATCHES):
            axis = axis_of(length)
            whole = torch.zeros(batch, length, 7, dtype=torch.float64)
            in_padding, out_padding = (
                1 - held(torch.zeros_like(whole), s, axis.rank, tp, padding=1.0) if s == SEQUENCE else 1.0
                for s in (arrives, wanted)
            )
            x = (value(held(whole, arrives, axis.rank, tp).shape, arrives) * in_padding).requires_grad_()
            y = function((arrives, wanted), 7)(x, axis)
            g = gradient(tuple(y.shape), wanted) * out_padding
            y.backward(g)
            assert x.grad is not None
            left, right = pairing(y.detach(), g, wanted), pairing(x.detach(), x.grad, arrives)
            assert math.isclose(left, right, rel_tol=1e-12, abs_tol=1e-12), (arrives, wanted, length, batch, left, right)

    run_ranks(body, tp)


# ------------------------------------------------------------------------------------------------------------ the axis


def test_backward_tells_that_it_began() -> None:
    def body() -> None:
        axis = axis_of(6)
        began: list[int] = []
        axis.on_backward = lambda: began.append(1)
        for pair in SENT:
            whole = torch.ones(1, 6, 4)
            y = function(pair, 4)(held(whole, pair[0], axis.rank, axis.size).requires_grad_(), axis)
            assert not began
            y.sum().backward()
            assert began == [1], pair
            began.clear()

    run_ranks(body, 2)


def test_second_derivatives() -> None:
    """A recorded backward pass is gone through again: each function is linear, so the gradient of |gradient|^2 is that of a pair of the other way."""

    def body() -> None:
        for pair in SENT:
            axis = axis_of(6)
            x = held(
                torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(1)), pair[0], axis.rank, axis.size
            ).requires_grad_()
            y = function(pair, 4)(x, axis)
            w = held(
                torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(2)), pair[1], axis.rank, axis.size
            ).requires_grad_()
            (first,) = torch.autograd.grad((y * w).sum(), x, create_graph=True)
            v = held(
                torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(3)), pair[0], axis.rank, axis.size
            ).requires_grad_()
            (second,) = torch.autograd.grad((first * v).sum(), w, create_graph=True)
            assert torch.allclose(second, function(pair, 4)(v, axis))  # the derivative of L* w by w along v is L v
            assert second.requires_grad

    run_ranks(body, 2)
