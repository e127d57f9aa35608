"""Batches that travel: what arrives is what was sent, and what cannot be sent is an error on every rank."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lightning_tp import TPError
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.data.group_loader import share_loader
from lightning_tp.data.reader import Message
from lightning_tp.data.transfer import Ranks, broadcast_message
from lightning_tp.testing import fake_world, run_ranks


def test_batches_arrive_as_they_were() -> None:
    """Dtypes, shapes, containers; odd tensors and other objects; what can't be sent is refused on all ranks."""

    class Words(dict):
        pass

    batch = {
        "bool": torch.tensor([True, False, True]),
        "half": torch.randn(3, 5).bfloat16().t(),
        "scalar": torch.tensor(3),
        "none": torch.empty(0, 4, dtype=torch.int32),
        "pair": (torch.arange(3), "text", None, 2.5),
        "sparse": torch.eye(3).to_sparse(),
        "requires a gradient": torch.randn(3, requires_grad=True),
        "array": np.arange(3),
    }

    def body() -> Any:
        if dist.get_rank():
            torch.manual_seed(1)
        ranks = Ranks(make_mesh("cpu", 1, 2))
        (found,) = share_loader(iter([batch]), ranks)
        errors = []
        for bad in (lambda: [lambda: 1], lambda: _raise()):
            try:
                list(share_loader(_Lazy(bad), ranks))
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
        return found, errors

    for found, errors in run_ranks(body, 2):
        assert found["array"].tolist() == [0, 1, 2] and found["pair"][1:] == ("text", None, 2.5)
        for name in ("bool", "half", "scalar", "none", "sparse", "requires a gradient"):
            assert found[name].requires_grad is batch[name].requires_grad
            torch.testing.assert_close(found[name], batch[name], check_stride=False)
        assert "cannot be pickled" in errors[0] and "no such file" in errors[1], errors


class _Lazy:
    """Its first batch is fine."""

    def __init__(self, second: Callable[[], Any]) -> None:
        self.second = second

    def __iter__(self) -> Iterator[Any]:
        yield torch.zeros(1)
        yield self.second()


def _raise() -> None:
    raise OSError("no such file")


def test_random_states_arrive_with_a_batch() -> None:
    """Only those that the message carries; the others stay those of the rank."""

    def body() -> tuple[float, float]:
        ranks = Ranks(make_mesh("cpu", 1, 2))
        torch.manual_seed(ranks.tp_rank)
        np.random.seed(ranks.tp_rank)
        broadcast_message(Message("batch", 1, rng={"cpu": torch.get_rng_state()}) if ranks.tp_rank == 0 else None, ranks)
        return torch.rand(1).item(), np.random.rand()

    (a, x), (b, y) = run_ranks(body, 2)
    assert a == b and x != y


def test_numbers_are_gathered_in_rank_order() -> None:
    def body() -> tuple[list[int], list[int], list[int]]:
        ranks = Ranks(make_mesh("cpu", 2, 2))
        mine = 10 * ranks.dp_rank + ranks.tp_rank
        return ranks.over_tp(mine), ranks.over_dp(mine), [ranks.zero, ranks.first]

    assert run_ranks(body, 4) == [
        ([0, 1], [0, 10], [0, 0]),
        ([0, 1], [1, 11], [0, 0]),
        ([10, 11], [0, 10], [0, 2]),
        ([10, 11], [1, 11], [0, 2]),
    ]


def test_other_backends_get_gloo_groups(monkeypatch: Any) -> None:
    """As under nccl, whose groups can't take CPU tensors."""
    made: list[Any] = []
    monkeypatch.setattr(
        "torch.distributed.new_subgroups_by_enumeration", lambda rows, backend: (made.append((backend, rows)) or f"{rows}", None)
    )
    with fake_world(4, rank=3):
        ranks = Ranks(init_device_mesh("cpu", (2, 2), mesh_dim_names=("data_parallel", "tensor_parallel")))
    assert made == [("gloo", [[0, 1], [2, 3]]), ("gloo", [[0, 2], [1, 3]])]
    assert str(ranks.tp_group) == "[[0, 1], [2, 3]]" and str(ranks.dp_group) == "[[0, 2], [1, 3]]"


def test_states_that_differ_are_taken_over_and_told_once_a_batch_that_differs_raises() -> None:
    def body() -> tuple[list[float], list[str], str]:
        ranks, told, own = Ranks(make_mesh("cpu", 1, 2)), [], random.Random(rank := dist.get_rank())
        random.seed(rank)
        ranks.watch({"own": own})
        drawn = [random.random(), own.random()]
        assert ranks.agree(5, told.append) == [5, 5] and not told
        if rank == 0:
            random.random(), own.random()
        assert ranks.agree(7 + rank, told.append) == [7, 8] and not told  # batches that differ are told of anyway
        drawn += [random.random(), own.random()]
        random.seed(rank)
        ranks.agree(5, told.append)
        ranks.given = "`training_step`", 3 + rank
        try:
            ranks.agree(5, told.append)
        except TPError as error:
            return drawn, told, str(error)
        return drawn, told, ""

    first, second = run_ranks(body, 2)
    assert first == second and len(first[1]) == 1 and "random states of a tensor-parallel group differed" in first[1][0]
    assert first[2].startswith("`training_step`: the ranks of a tensor-parallel group were given different batches")
    assert first[0][:2] == [random.Random(0).random()] * 2
