"""Worlds of any size in one process, and groups of which one rank exists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.collectives import all_gather, all_reduce, reduce_scatter
from lightning_tp.core.comm.fake_world import FakeGroup, fake_world, single_rank_mesh
from lightning_tp.core.comm.mesh import DATA_PARALLEL, TENSOR_PARALLEL
from lightning_tp.errors import TPError


def test_a_world_ends_with_its_context() -> None:
    with pytest.raises(ZeroDivisionError), fake_world(64, rank=5):
        assert (dist.get_world_size(), dist.get_rank()) == (64, 5)
        dist.all_reduce(torch.ones(2))
        1 / 0  # noqa: B018
    assert not dist.is_initialized()
    with fake_world(2):
        dist.destroy_process_group()  # the body may do it
    with fake_world(3, rank=2):
        assert dist.get_rank() == 2


def test_a_world_in_a_world_and_ranks_that_are_not_there() -> None:
    with fake_world(4):
        with pytest.raises(TPError, match=r"`fake_world\(8\)`: this process has a process group of 4 ranks already"), fake_world(8):
            pass
        assert dist.get_world_size() == 4
    for rank in (-1, 2):
        with (
            pytest.raises(TPError, match=rf"`fake_world\(2, rank={rank}\)`: a world of 2 has ranks 0 to 1"),
            fake_world(2, rank=rank),
        ):
            pass
    assert not dist.is_initialized()


def test_a_mesh_of_one_rank() -> None:
    with single_rank_mesh() as mesh:
        assert mesh.mesh_dim_names == (DATA_PARALLEL, TENSOR_PARALLEL) and mesh.size() == 1
        assert mesh.get_local_rank(TENSOR_PARALLEL) == 0
    assert not dist.is_initialized()


def test_a_group_of_which_one_rank_exists() -> None:
    sent: list[tuple[str, int]] = []
    axis = Axis(FakeGroup(2, 4, note=lambda kind, size: sent.append((kind, size))))
    assert (axis.rank, axis.size) == (2, 4)
    x = torch.arange(6.0).view(1, 3, 2)
    assert torch.equal(all_reduce(x.clone(), axis), x)
    assert torch.equal(all_gather(x, 1, 12, axis), x.repeat(1, 4, 1))
    assert reduce_scatter(torch.ones(2, 8, 2), 1, axis).shape == (2, 2, 2)
    assert sent == [("all-reduce", 24), ("all-gather", 96), ("reduce-scatter", 128)]
    assert FakeGroup(0, 2).allreduce([torch.ones(1)]).wait()  # nobody has to note


def test_a_collective_on_the_meta_device_runs_no_operator() -> None:
    """The estimator counts what runs: a copy that only the fake backend makes is no kernel of the step."""
    seen: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    axis = Axis(FakeGroup(0, 4))
    x = torch.empty(1, 3, 2, device="meta")
    full = torch.empty(1, 12, 2, device="meta")
    with Seen():
        assert axis.group._allgather_base(full, x).wait() and axis.group._reduce_scatter_base(x, full).wait()
    assert not [name for name in seen if "copy" in name]
