"""Random streams of the ranks: one shared inside each tensor-parallel group, and each rank's own; saved and restored.

The shared stream is torch's default generator. Ranks of one tensor-parallel group have it in the same state and draw from it what is for
replicated activations; ranks further along the data-parallel axis have another one. What is drawn for a rank's shard comes from a stream of
its own, which is seeded anew for each such draw by the state of the shared stream and the rank. So it has no state to save, and activation
checkpointing, which restores the shared stream, replays it. Which call draws from which stream: `random_numbers.py`.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lightning_tp.core.comm.mesh import DATA_PARALLEL, TENSOR_PARALLEL

T = TypeVar("T")
_OFFSET_STEP = 4  # the offset of a CUDA generator is a multiple of this


_left: tuple[int, torch.Tensor] | None = None  # seed and state of this rank's stream, before it took that of the first rank


def share_random_states(mesh: DeviceMesh) -> None:
    """Give every rank the random states of the first one: torch's, Python's and NumPy's. A collective.

    Before anything is drawn, so that code which builds data and models draws the same on all ranks, seeded or not.
    """
    global _left
    _left = torch.initial_seed(), torch.get_rng_state()
    set_local_state(_state_of_first(mesh))


def seed_mesh(mesh: DeviceMesh) -> None:
    """Give every rank the random states of the first one; further along the data-parallel axis torch draws another stream. A collective.

    Otherwise ranks that the user has not seeded would drop different elements of one replicated activation. The first data-parallel rank
    continues just as one process would, and so do the others with their streams, until somebody seeds anew. Python's and NumPy's numbers are
    equal on all ranks, as under `seed_everything`: code decides by them.
    """
    own = [(torch.initial_seed(), torch.get_rng_state()), _left]
    set_local_state(_state_of_first(mesh))
    dp_rank = mesh.get_local_rank(DATA_PARALLEL)
    if not dp_rank:
        return
    seed = (torch.initial_seed() + dp_rank) % 2**63
    # a stream with this seed was begun by an earlier run
    payload = [next((stream[1] for stream in own if stream is not None and stream[0] == seed), None)]
    dist.broadcast_object_list(payload, group=mesh.get_group(TENSOR_PARALLEL), group_src=0)
    if payload[0] is None:
        torch.default_generator.manual_seed(seed)
    else:
        torch.set_rng_state(payload[0])
    if mesh.device_type == "cuda":  # its streams have a position: that of the first one
        generator = default_generator(torch.device("cuda"))
        offset = generator.get_offset()
        generator.manual_seed((generator.initial_seed() + dp_rank) % 2**63)
        generator.set_offset(offset)


def _state_of_first(mesh: DeviceMesh) -> dict[str, Any]:
    if mesh.device_type == "cuda":
        torch.cuda.init()  # else its random states are not among them
    payload: list[Any] = [local_state()]
    dist.broadcast_object_list(payload, src=int(mesh.mesh.flatten()[0]))
    state: dict[str, Any] = payload[0]
    return state


def on_rank_stream(rank: int, device: torch.device, draw: Callable[[], T]) -> T:
    """Call `draw` with this rank's own random numbers; the shared stream advances equally on all ranks, whatever is drawn.

    Example:
        >>> cpu = torch.device("cpu")
        >>> state = torch.get_rng_state()
        >>> a, after = on_rank_stream(0, cpu, lambda: torch.rand(2)), torch.rand(2)
        >>> torch.set_rng_state(state)
        >>> b, same = on_rank_stream(1, cpu, lambda: torch.rand(2)), torch.rand(2)
        >>> torch.equal(a, b), torch.equal(after, same)
        (False, True)
    """
    generator = default_generator(device)
    if device.type == "cuda":
        seed, offset = generator.initial_seed(), generator.get_offset()
        generator.manual_seed(_mixed(_mixed(seed, offset), rank))
        try:
            return draw()
        finally:
            generator.manual_seed(seed)
            generator.set_offset(offset + _OFFSET_STEP)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    state = generator.get_state()
    generator.manual_seed(_mixed(seed, rank))
    try:
        return draw()
    finally:
        generator.set_state(state)


def default_generator(device: torch.device) -> torch.Generator:
    """Return torch's default generator for a device."""
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def _mixed(seed: int, rank: int) -> int:
    """A seed unrelated to those of neighbouring seeds and ranks (the finalizer of splitmix64)."""
    z = (seed + (rank + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) % 2**63


def local_state() -> dict[str, Any]:
    """Return the random states of this process as plain data and tensors: torch's, Python's, and NumPy's if it is imported.

    torch's are those of the CPU and, once CUDA is in use, of the current device: the one GPU that a rank works on.
    """
    state: dict[str, Any] = {"cpu": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (kind, torch.from_numpy(keys.astype("int64")), *rest)
    return state


def set_local_state(state: Mapping[str, Any]) -> None:
    """Restore what `local_state` returned, also on another kind of device: what it has no generator for is left out.

    Example:
        >>> state = local_state()
        >>> a = torch.rand(2), random.random()
        >>> set_local_state(state)
        >>> torch.equal(torch.rand(2), a[0]), random.random() == a[1]
        (True, True)
    """
    torch.set_rng_state(state["cpu"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
    if "numpy" in state:
        import numpy

        kind, keys, *rest = state["numpy"]
        numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))


@contextmanager
def local_state_restored() -> Iterator[None]:
    """Restore this process's random states on exit."""
    before = local_state()
    try:
        yield
    finally:
        set_local_state(before)


def seed_torch(seed: int) -> None:
    """Seed the streams that `local_state` has of torch. `torch.manual_seed` would seed those of all other devices, too."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


class DeviceState:
    """The state of the random numbers of this rank's GPU, to draw them again later; nothing where CUDA is not in use.

    `torch.utils.checkpoint` keeps the states of the devices of tensors that are passed by position, and of no others.
    """

    def __init__(self) -> None:
        self.generator = default_generator(torch.device("cuda")) if torch.cuda.is_initialized() else None
        self.state = None if self.generator is None else self.generator.get_state()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw in this context what was drawn after this state was taken; the stream continues on exit where it stood."""
        if self.generator is None or self.state is None:
            yield
            return
        before = self.generator.get_state()
        self.generator.set_state(self.state)
        try:
            yield
        finally:
            self.generator.set_state(before)


def rng_state(mesh: DeviceMesh) -> dict[str, Any]:
    """Return the random states of all ranks, for a checkpoint. A collective.

    Returns:
        `{"mesh": (dp, tp), "ranks": [state of rank 0, ..]}`, ranks in the order of the mesh; the same on every rank.
    """
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, local_state())
    return {"mesh": tuple(mesh.mesh.shape), "ranks": [every[rank] for rank in mesh.mesh.flatten().tolist()]}


def set_shared_state(mesh: DeviceMesh, state: Mapping[str, Any]) -> None:
    """Restore what `rng_state` returned: each rank continues with the random numbers that its mesh coordinate was about to draw.

    On a mesh of another shape the shared stream of each tensor-parallel group continues, so that what one process would draw (the order of the
    data, masks of replicated activations) is drawn. Groups further along the data-parallel axis than there were start a stream of their own.
    """
    dp, tp = state["mesh"]
    dp_rank = mesh.get_local_rank(DATA_PARALLEL)
    if (dp, tp) == tuple(mesh.mesh.shape):
        saved = state["ranks"][mesh.mesh.flatten().tolist().index(dist.get_rank())]
    else:
        saved = state["ranks"][dp_rank * tp if dp_rank < dp else 0]
    set_local_state(saved)
    if dp_rank >= dp:
        torch.default_generator.manual_seed(_mixed(int(torch.empty((), dtype=torch.int64).random_()), dp_rank))
    if mesh.device_type != "cuda":
        return
    generator = default_generator(torch.device("cuda"))
    if "cuda" not in saved:  # by ranks on the CPU
        copy = torch.Generator()
        copy.set_state(torch.get_rng_state())  # the default one must not advance
        generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_(generator=copy)))
    elif dp_rank >= dp:
        generator.manual_seed(_mixed(_mixed(generator.initial_seed(), generator.get_offset()), dp_rank))
