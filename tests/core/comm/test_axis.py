"""The axis: inputs that several layers share, copies, even shards."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_tp.core.comm.axis import even_shard
from lightning_tp.core.comm.state import SEQUENCE, I, R
from lightning_tp.core.comm.transitions import transition
from lightning_tp.testing import run_ranks
from tests.core.comm.test_transitions import SENT, axis_of, integers
from tests.harness import Collectives, held


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


def test_a_copied_axis_has_the_same_group_and_a_state_of_its_own() -> None:
    def body() -> None:
        axis = axis_of()
        axis.on_backward = lambda: None
        first, second = copy.deepcopy([axis, axis])
        assert first is second and first is not axis and first.group is axis.group
        assert (first.rank, first.size, first.on_backward) == (axis.rank, axis.size, None)

    run_ranks(body, 1)


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
