"""Replicated or sharded: activations compared over ranks, and noise followed to what it meets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_tp as ltp
from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.ops.random_calls import FunctionCall
from lightning_tp.core.ops.replication import (
    SAMPLE,
    TOLERANCE,
    NoiseSource,
    NoiseTracker,
    is_broadcast_over_shards,
    shapes_if_sharded,
)
from lightning_tp.testing import run_ranks


def test_activations_compared_over_ranks() -> None:
    def body() -> None:
        axis, rank = Axis(dist.group.WORLD), dist.get_rank()
        torch.manual_seed(0)
        x = torch.rand(4, 9, 100)
        state = torch.get_rng_state()

        def shapes(t: Tensor) -> Any:
            return shapes_if_sharded(t, axis)

        assert (
            shapes(x) is None and shapes(x.int()) is None and shapes(torch.zeros(())) is None and shapes(torch.zeros(0, 3)) is None
        )
        assert shapes(x + rank) == [(4, 9, 100)] * 2
        assert shapes(x[..., : 50 + rank]) == [(4, 9, 50), (4, 9, 51)]  # sizes tell, whatever is in it
        assert shapes(torch.zeros(2 + rank)) == [(2,), (3,)]
        assert shapes(torch.zeros(6).view((6,) if rank else (2, 3))) == [(2, 3), (6,)]
        assert shapes(x * (1 + rank * TOLERANCE / 2)) is None and shapes(x * (1 + rank * TOLERANCE * 2)) is not None
        assert shapes(torch.full((3,), torch.nan) * rank) is None
        assert shapes(torch.zeros(SAMPLE * 3)) is None
        last = torch.zeros(3 * SAMPLE)
        last[3 * rank * (SAMPLE - 1)] = 1  # in the sample: every third
        assert shapes(last) is not None
        other = torch.zeros(3 * SAMPLE)
        other[1] = rank  # not in it
        assert shapes(other) is None
        assert shapes((x + rank).requires_grad_()) == [(4, 9, 100)] * 2
        assert shapes(torch.zeros([1] * 8 + [3])) is None
        assert torch.equal(torch.get_rng_state(), state)

    run_ranks(body, 2)


def test_generators_in_other_states_are_refused() -> None:
    def body() -> None:
        torch.manual_seed(0)
        torch.rand(dist.get_rank())
        with pytest.raises(
            ltp.TPError,
            match=r"shape \(2, 3\), but the default generator for cpu is not in the same state on all tp=2",
        ):
            shapes_if_sharded(torch.zeros(2, 3), Axis(dist.group.WORLD))

    run_ranks(body, 2)


@pytest.mark.parametrize(
    ("noise", "activation", "seq_len", "expected"),
    [
        ((2, 1, 1), (2, 5, 8), None, True),  # drop path: one number for each sample
        ((2, 5, 1), (2, 5, 8), None, True),
        ((2, 5, 8), (2, 5, 8), None, False),
        ((1, 1, 8), (2, 5, 8), None, False),
        ((8,), (2, 5, 8), None, False),
        ((1,), (2, 5, 8), None, True),
        ((), (2, 5, 8), None, True),
        ((2, 5, 1), (2, 5, 8), 10, False),  # the activation is a shard of the sequence: its tokens have other numbers
        ((2, 5, 1), (2, 5, 8), 9, False),
        ((2, 5, 1), (2, 5, 8), 12, True),  # of another length
        ((2, 1, 8), (2, 5, 8), 10, True),
        ((8,), (2, 5, 8), 10, True),
        ((2, 4, 6, 6), (2, 4, 6, 6), None, False),
        ((2, 1, 6, 6), (2, 4, 6, 6), None, True),  # the same for all heads
        ((4, 1, 1), (2, 4, 6, 6), None, False),
        ((6, 6), (2, 4, 6, 6), None, True),
    ],
)
def test_noise_with_one_number_for_all_shards(
    noise: tuple[int, ...], activation: tuple[int, ...], seq_len: int | None, expected: bool
) -> None:
    axis: Any = SimpleNamespace(size=2, seq_len=seq_len)
    assert is_broadcast_over_shards(noise, activation, axis) is expected


def test_noise_is_followed_until_it_meets_an_activation() -> None:
    tracker, source, other = NoiseTracker(), NoiseSource(nn.Identity(), ("rand", ())), NoiseSource(None, ("rand", ()))
    assert not tracker

    def run(func: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        call = FunctionCall(func, args, kwargs)
        out = call.run()
        return out, tracker.meeting(call, out)

    noise, more, x = torch.rand(3), torch.rand(3), torch.ones(3)
    tracker.add(noise, source)
    tracker.add(more, other)
    assert tracker and run(torch.mul, x, x)[1] is None
    mask, met = run(torch.Tensor.lt, noise, 0.5)
    assert met is None
    scaled, met = run(torch.mul, mask, torch.tensor(2.0))  # a single number is no activation
    assert met is None
    both, met = run(torch.mul, scaled, noise)  # nor are other noise, integers
    assert met is None and run(torch.add, both, torch.ones(3, dtype=torch.int64))[1] is None
    _, met = run(torch.mul, input=x, other=both)
    assert met is not None and met[0] is both and met[1] is x and met[2] is source
    assert run(torch.mul, x, noise)[1] is None and run(torch.mul, x, mask)[1] is None  # no longer followed, all that came of it
    assert tracker
    assert run(F.dropout, more, 0.5)[1] is None and run(torch.add, x, more)[1] is not None
    assert not tracker
    tracker.add(noise, source)
    tracker.clear()
    assert not tracker
