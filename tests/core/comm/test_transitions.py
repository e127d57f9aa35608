"""The conjugate pairs by hand: values, gradients, adjointness, and exactly what is sent."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_tp.core.comm import collectives
from lightning_tp.core.comm.axis import Axis, even_shard
from lightning_tp.core.comm.collectives import all_gather, all_reduce, reduce_scatter
from lightning_tp.core.comm.state import SEQUENCE, WIDTH, I, P, R, State
from lightning_tp.core.comm.transitions import invariant_to_sequence, sequence_to_replicate, transition, width_to_invariant
from lightning_tp.errors import TPError
from lightning_tp.testing import run_ranks
from tests.harness import Collectives, gradient_held, held, shard_of

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


def test_plain_collectives() -> None:
    def body() -> None:
        axis = axis_of()
        rank, tp = axis.rank, axis.size
        x = torch.full((2, 3), float(rank))
        assert all_reduce(x, axis) is x and torch.equal(x, torch.full((2, 3), 6.0))
        for dim, shape in itertools.product((0, 1, 2), ((5, 6, 7), (1, 6, 9), (4, 1, 8))):
            whole = integers(*shape, seed=3)
            shard = shard_of(whole, dim, rank, tp, padding=0.0)
            assert torch.equal(collectives.shard_of(whole, dim, axis), shard), (dim, shape)
            assert torch.equal(all_gather(shard, dim, shape[dim], axis), whole), (dim, shape)
            assert torch.equal(reduce_scatter(whole, dim, axis), shard * tp), (dim, shape)
        held_bytes = collectives.shard_of(torch.zeros(1, 64, 64), 1, axis).untyped_storage().nbytes()
        assert held_bytes == 16 * 64 * 4  # a view would keep the whole alive

    run_ranks(body, 4)


# ------------------------------------------------------------------------------------------------------------ the axis


@pytest.mark.parametrize("arrives", [I, SEQUENCE])
def test_readers_of_one_tensor_share_its_collective(arrives: str) -> None:
    def body() -> None:
        axis = axis_of(16)
        enter = transition(arrives, R)
        assert enter is not None
        x = held(integers(2, 16, 4, seed=1), arrives, axis.rank, axis.size).requires_grad_()
        weights = [integers(4, seed=axis.rank * 10 + i) for i in range(3)]
        with Collectives() as forward:
            ys = [axis.share(x, enter) * w for w in weights]
        assert forward.kinds == SENT[arrives, R][0]
        with Collectives() as backward:
            sum(ys).sum().backward()  # type: ignore[union-attr]
        assert backward.kinds == SENT[arrives, R][1]
        every: list[Tensor] = [torch.zeros(4) for _ in range(axis.size)]
        dist.all_gather(every, sum(weights))  # type: ignore[arg-type]
        assert x.grad is not None and torch.equal(x.grad, sum(every).expand_as(x))  # type: ignore[union-attr]

    run_ranks(body, 2)


def test_what_is_shared_is_never_stale() -> None:
    def body() -> None:
        axis = axis_of(16)
        enter = transition(SEQUENCE, R)
        assert enter is not None
        x = torch.ones(1, 8, 4)

        def sent(x: Tensor) -> int:
            with Collectives() as comm:
                axis.share(x, enter)
            return len(comm.sent)

        assert [sent(x), sent(x)] == [1, 0]
        x.add_(1)  # written to
        assert [sent(x), sent(x)] == [1, 0] and bool((axis.share(x, enter) == 2).all())
        with torch.no_grad():  # a gradient is not recorded
            assert [sent(x), sent(x)] == [1, 0]
        assert sent(x) == 1
        x.requires_grad_()  # or is recorded from now on
        assert sent(x) == 1 and axis.share(x, enter).requires_grad
        assert sent(x.detach().clone()) == 1  # another tensor of the same values
        assert sent(x) == 1
        axis.forget()
        assert axis._shared is None and sent(x) == 1
        with torch.inference_mode():  # Lightning validates in it; its tensors count no versions
            x = torch.ones(1, 8, 4)
            y = axis.share(x, enter)
            assert y.shape == (1, 16, 4)
            x.add_(1)
            assert bool((axis.share(x, enter) == 2).all())

    run_ranks(body, 2)


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


def test_a_copied_axis_has_the_same_group_and_a_state_of_its_own() -> None:
    def body() -> None:
        axis = axis_of()
        axis.on_backward = lambda: None
        first, second = copy.deepcopy([axis, axis])
        assert first is second and first is not axis and first.group is axis.group
        assert (first.rank, first.size, first.on_backward) == (axis.rank, axis.size, None)

    run_ranks(body, 1)


def test_second_derivatives_raise() -> None:
    """Collectives inside a backward pass are not recorded: a gradient of the gradient would be wrong without a word."""

    def body() -> None:
        for pair in SENT:
            axis = axis_of(6)
            x = held(torch.ones(1, 6, 4), pair[0], axis.rank, axis.size).requires_grad_()
            y = function(pair, 4)(x, axis)
            with pytest.raises(RuntimeError, match=r"once_differentiable"):
                torch.autograd.grad((y * y).sum(), x, create_graph=True)

    run_ranks(body, 2)


# -------------------------------------------------------------------------------------------------------------- errors


def test_a_shard_of_another_length_is_refused() -> None:
    def body() -> None:
        axis = axis_of()
        with pytest.raises(TPError, match=r"\(1, 4, 2\).*no sequence was sharded.*`replicate`.*sequence_parallel=False"):
            sequence_to_replicate(torch.zeros(1, 4, 2), axis)
        invariant_to_sequence(torch.zeros(1, 9, 2), axis)  # 5 and 4
        assert sequence_to_replicate(torch.zeros(1, 5, 2), axis).shape == (1, 9, 2)
        for pair in ((SEQUENCE, R), (SEQUENCE, I)):
            for wrong in (4, 9):
                with pytest.raises(TPError, match=rf"\(1, {wrong}, 2\).*tp=2 ranks has 9 tokens, 5 per rank"):
                    function(pair, 2)(torch.zeros(1, wrong, 2), axis)

    run_ranks(body, 2)


@pytest.mark.parametrize("pair", [(I, SEQUENCE), (P, SEQUENCE)], ids=str)
def test_two_sequences_whose_shards_are_as_long_are_told_apart(pair: Pair) -> None:
    """An encoder's 9 tokens, then a decoder's 10, both 5 a rank: the first would get a token of padding, without a word."""

    def body() -> None:
        axis = axis_of()
        cut_first = function(pair, 2)
        first = torch.tanh(cut_first(torch.ones(1, 9, 2, requires_grad=True), axis)) * 2
        assert sequence_to_replicate(first, axis).shape == (1, 9, 2)
        second = torch.tanh(cut_first(torch.ones(1, 10, 2, requires_grad=True), axis)) * 2
        assert sequence_to_replicate(second, axis).shape == (1, 10, 2)  # another batch is well
        with pytest.raises(TPError, match=r"of 9 tokens .* of 10 tokens .* tp=2 ranks \(5 tokens per rank in both\).*output='I'"):
            sequence_to_replicate(first + 1, axis)
        third = cut_first(torch.ones(1, 9, 2, requires_grad=True), axis)
        assert sequence_to_replicate(third, axis).shape == (1, 9, 2)

    run_ranks(body, 2)


def test_the_length_is_that_of_the_last_cut() -> None:
    def body() -> None:
        axis = axis_of()
        for pair, length in (((I, SEQUENCE), 9), ((P, SEQUENCE), 6)):
            function(pair, 2)(torch.zeros(1, length, 2), axis)
            assert axis.seq_len == length

    run_ranks(body, 2)


def test_even_shard_by_hand() -> None:
    assert [even_shard(341, r, 2) for r in range(2)] == [range(171), range(171, 341)]
    assert [even_shard(1003, r, 4) for r in range(4)] == [range(251), range(251, 502), range(502, 753), range(753, 1003)]
    assert [len(even_shard(5, r, 4)) for r in range(4)] == [2, 2, 1, 0]
    assert [len(even_shard(2, r, 4)) for r in range(4)] == [1, 1, 0, 0]
    assert [len(even_shard(0, r, 3)) for r in range(3)] == [0, 0, 0]


def test_even_shard_is_what_chunk_cuts() -> None:
    for length, tp in itertools.product((1, 2, 7, 16, 17, 341, 1003), (1, 2, 3, 4, 8)):
        shards = [list(even_shard(length, r, tp)) for r in range(tp)]
        assert [i for shard in shards for i in shard] == list(range(length))
        assert [s for s in shards if s] == [c.tolist() for c in torch.arange(length).chunk(tp)]
