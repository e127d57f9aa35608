"""The mesh: two axes of ranks, data-parallel x tensor-parallel, named as Lightning names them.

Ranks of one tensor-parallel group are neighbours (ranks 0 to tp - 1 are the first group), so that they are inside a node, where links are fast.
"""

from __future__ import annotations

import weakref
from typing import Any, Literal

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lightning_tp._compat import wait_for_gloo_at_exit
from lightning_tp.errors import TPError

DATA_PARALLEL = "data_parallel"
TENSOR_PARALLEL = "tensor_parallel"


def mesh_sizes(
    tp: int | Literal["auto"], dp: int | Literal["auto"], world: int, *, ranks_per_node: int | None = None
) -> tuple[int, int]:
    """Return (dp, tp) for a world size. By default tp is the number of ranks of a node, and dp the rest of the world.

    Raises:
        TPError: if the two don't make up the world; it names the sizes that do.

    Example:
        >>> mesh_sizes(2, "auto", world=8)
        (4, 2)
        >>> mesh_sizes("auto", "auto", world=16, ranks_per_node=8)
        (2, 8)
    """
    for name, size in (("tp", tp), ("dp", dp)):
        if size != "auto" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise TPError(f"`{name}={size!r}`: give a number of ranks, 1 or more, or 'auto'.")
    divisors = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
    if tp != "auto":
        num_tp = tp
    elif dp != "auto" and world % dp == 0:
        num_tp = world // dp
    else:
        num_tp = min(ranks_per_node or world, world)
        if world % num_tp:
            raise TPError(
                f"`tp='auto'` means the {num_tp} ranks of a node, and the world size {world} is no multiple of that. Use tp={divisors}."
            )
    if dp == "auto" and world % num_tp:
        raise TPError(
            f"`tp={tp}` needs a multiple of {tp} ranks, and the world size is {world}. Use tp={divisors}, or another number of devices."
        )
    num_dp = world // num_tp if dp == "auto" else dp
    if num_dp * num_tp != world:
        raise TPError(
            f"`dp={num_dp}` x `tp={num_tp}` are {num_dp * num_tp} ranks, and the world size is {world}. Leave one of them 'auto' "
            f"(tp={divisors} divide {world}), or start {num_dp * num_tp} ranks."
        )
    return num_dp, num_tp


def make_mesh(device_type: str, dp: int, tp: int) -> DeviceMesh:
    """Make the 2D mesh over all ranks of the default process group. A collective."""
    return init_device_mesh(device_type, (dp, tp), mesh_dim_names=(DATA_PARALLEL, TENSOR_PARALLEL))


_made: tuple[Any, dict[tuple[str, int, int], DeviceMesh]] = (None, {})  # a weak reference to the default group, and its meshes


def same_mesh(device_type: str, dp: int, tp: int) -> DeviceMesh:
    """Do what `make_mesh` does, but once: process groups live until the process ends, so runs of a Trainer share them."""
    global _made
    world = dist.group.WORLD
    if _made[0] is None or _made[0]() is not world:
        _made = (weakref.ref(world), {})
    meshes = _made[1]
    if (device_type, dp, tp) not in meshes:
        meshes[device_type, dp, tp] = make_mesh(device_type, dp, tp)
    return meshes[device_type, dp, tp]


def check_mesh(mesh: DeviceMesh) -> tuple[DeviceMesh, DeviceMesh]:
    """Return the data-parallel and the tensor-parallel axis of a mesh.

    Raises:
        TPError: for a mesh with other axes, or without a process group.
    """
    names = mesh.mesh_dim_names or ()
    if tuple(names) != (DATA_PARALLEL, TENSOR_PARALLEL):
        raise TPError(
            f"The mesh has the axes {tuple(names)}, but needs ('{DATA_PARALLEL}', '{TENSOR_PARALLEL}') in this order, the names that Lightning "
            f"uses: init_device_mesh(device, (dp, tp), mesh_dim_names=('{DATA_PARALLEL}', '{TENSOR_PARALLEL}'))."
        )
    if not dist.is_initialized():
        raise TPError("There is no process group. Start the ranks (by a Trainer or torchrun), and make the mesh first.")
    wait_for_gloo_at_exit()
    return mesh[DATA_PARALLEL], mesh[TENSOR_PARALLEL]
