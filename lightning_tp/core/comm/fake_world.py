"""A world of any size in one process: collectives return at once and move no data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.errors import TPError


@contextlib.contextmanager
def single_rank_mesh() -> Iterator[DeviceMesh]:
    """A mesh of one rank, data-parallel x tensor-parallel, in this process: what an applied model needs, without other ranks.

    Example:
        >>> with single_rank_mesh() as mesh:
        ...     mesh.mesh_dim_names
        ('data_parallel', 'tensor_parallel')
    """
    with fake_world(1):
        yield make_mesh("cpu", 1, 1)


@contextlib.contextmanager
def fake_world(size: int, rank: int = 0) -> Iterator[None]:
    """Make this process `rank` of a world of `size` in which collectives return at once and move no data.

    Good for shapes, plans and memory at any world size; the *values* that a collective leaves are wrong.

    Example:
        >>> with fake_world(1024, rank=3):
        ...     dist.get_world_size(), dist.get_rank()
        (1024, 3)
        >>> dist.is_initialized()
        False
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # importing it registers the backend

    if dist.is_initialized():
        raise TPError(
            f"`fake_world({size})` found a process group of {dist.get_world_size()} ranks in this process."
            " Call `torch.distributed.destroy_process_group()` first."
        )
    if not 0 <= rank < size:
        raise TPError(f"`fake_world({size}, rank={rank})`: a world of {size} has ranks 0 to {size - 1}.")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        if dist.is_initialized():  # the body may have closed it
            dist.destroy_process_group()
