"""A world of any size in one process, with torch's `fake` backend: collectives return at once and move no data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_tp._compat import done_with, fake_process_group, fake_store
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.core.trees import tensors_in
from lightning_tp.errors import TPError


@contextlib.contextmanager
def single_rank_mesh() -> Iterator[DeviceMesh]:
    """Make a mesh of one rank, data-parallel x tensor-parallel, in this process: for an applied model without other ranks.

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

    For shapes, plans and memory at any world size; the *values* that a collective leaves are wrong.

    Raises:
        TPError: if there is a process group already, or the world has no such rank.

    Example:
        >>> with fake_world(1024, rank=3):
        ...     dist.get_world_size(), dist.get_rank()
        (1024, 3)
        >>> dist.is_initialized()
        False
    """
    if dist.is_initialized():
        raise TPError(
            f"`fake_world({size})`: this process has a process group of {dist.get_world_size()} ranks already. "
            "Call `torch.distributed.destroy_process_group()` first."
        )
    if not 0 <= rank < size:
        raise TPError(f"`fake_world({size}, rank={rank})`: a world of {size} has ranks 0 to {size - 1}.")
    dist.init_process_group("fake", store=fake_store(), rank=rank, world_size=size)
    try:
        yield
    finally:
        if dist.is_initialized():  # the body may have closed it
            dist.destroy_process_group()


class FakeGroup(dist.ProcessGroup):
    """A process group of which only one rank exists: an all-gather returns copies of its shard, a sum its own term.

    Args:
        rank: the rank that exists.
        size: the number of ranks that the group has.
        note: called with the kind ("all-reduce", "all-gather", "reduce-scatter") and the bytes of the full tensor of each collective.

    Example:
        >>> import torch
        >>> sent = []
        >>> group = FakeGroup(1, 4, note=lambda kind, size: sent.append((kind, size)))
        >>> group.allreduce([torch.ones(2)]).wait()
        True
        >>> sent
        [('all-reduce', 8)]
    """

    def __init__(self, rank: int, size: int, note: Callable[[str, int], None] = lambda kind, size: None) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self.note = note
        self._fake = fake_process_group(rank, size)

    def allreduce(self, tensors: list[Tensor], *options: Any) -> Any:  # type: ignore[override]
        """Do what that of `dist.ProcessGroup` does."""
        self.note("all-reduce", sum(t.nbytes for t in tensors))
        return self._fake.allreduce(tensors, *options)

    def _allgather_base(self, output: Tensor, input: Tensor, *options: Any) -> Any:
        self.note("all-gather", output.nbytes)
        return self._done() if output.is_meta else self._fake._allgather_base(output, input, *options)

    def _reduce_scatter_base(self, output: Tensor, input: Tensor, *options: Any) -> Any:
        self.note("reduce-scatter", input.nbytes)
        return self._done() if output.is_meta else self._fake._reduce_scatter_base(output, input, *options)

    def _done(self) -> Any:
        """A collective that copies nothing, since there is nothing to copy: the fake backend's copies would count as kernels of the step."""
        return self._fake.allreduce([])


class LoneCollectives(TorchDispatchMode):
    """Let the collectives of code return at once, over whatever group: a gathered tensor is copies of this rank's, a sum its own term.

    Example:
        >>> import torch
        >>> with fake_world(2), LoneCollectives():
        ...     every = [torch.zeros(1), torch.zeros(1)]
        ...     dist.all_gather(every, torch.ones(1))
        >>> every
        [tensor([1.]), tensor([1.])]
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "c10d":
            return func(*args, **(kwargs or {}))
        name = str(func)
        if "gather" in name or "scatter" in name or "alltoall" in name:
            outputs, inputs = (list(tensors_in(x)) for x in args[:2])
            for i, out in enumerate(outputs if inputs else ()):
                source = inputs[i % len(inputs)].detach().reshape(-1)
                flat = source.repeat(-(-out.numel() // max(source.numel(), 1)))[: out.numel()]
                out.copy_(flat.view(out.shape))
        return done_with(func, args[0])
