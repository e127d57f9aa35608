"""Seeds: one random stream in each tensor-parallel group, different ones over the data-parallel axis.

What is whole on several ranks has to be dropped alike on all of them, so ranks of one tensor-parallel group draw the same numbers; data
that differs is dropped differently. Shards of one activation draw the same numbers on each rank, too: masks repeat over the shards.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lightning_tp.mesh import DATA_PARALLEL


def seed_mesh(mesh: DeviceMesh) -> None:
    """Give every rank the random state of the first one; further along the data-parallel axis, a stream of its own.

    Without it, ranks that the user has not seeded would drop different elements of one whole activation. The first data-parallel rank goes
    on just as one process would.
    """
    first = int(mesh.mesh.flatten()[0])
    payload: list[Any] = [(torch.get_rng_state(), torch.initial_seed())]
    dist.broadcast_object_list(payload, src=first)
    state, seed = payload[0]
    dp_rank = mesh.get_local_rank(DATA_PARALLEL)
    if dp_rank:
        torch.manual_seed((seed + dp_rank) % 2**63)
        return
    torch.set_rng_state(state)
    if mesh.device_type == "cuda":
        torch.cuda.manual_seed(seed % 2**63)
