"""The mesh: two axes of ranks, data-parallel x tensor-parallel, named as Lightning names them.

Ranks of one tensor-parallel group are neighbours (ranks 0 .. tp-1 are the first group): inside a node, where links are fast.
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
    """(dp, tp) for a world of ranks. Left to itself, tp is the ranks of a node, and dp what is left of the world.

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
    if tp == "auto":
        num_tp = world // dp if dp != "auto" and world % dp == 0 else min(ranks_per_node or world, world)
        if world % num_tp:
            raise TPError(
                f"`tp='auto'` means the {num_tp} ranks of a node, which do not divide a world of {world}. Use tp={divisors}."
            )
    else:
        num_tp = tp
    if dp == "auto" and world % num_tp:
        raise TPError(f"`tp={tp}` does not divide a world of {world} ranks. Use tp={divisors}, or another number of devices.")
    num_dp = world // num_tp if dp == "auto" else dp
    if num_dp * num_tp != world:
        raise TPError(
            f"`dp={num_dp}` x `tp={num_tp}` are {num_dp * num_tp} ranks, and the world has {world}. Leave one of them 'auto' "
            f"(tp={divisors} divide {world}), or start {num_dp * num_tp} ranks."
        )
    return num_dp, num_tp


def make_mesh(device_type: str, dp: int, tp: int) -> DeviceMesh:
    """The 2D mesh over all ranks of the default process group."""
    return init_device_mesh(device_type, (dp, tp), mesh_dim_names=(DATA_PARALLEL, TENSOR_PARALLEL))


_made: tuple[Any, dict[tuple[str, int, int], DeviceMesh]] = (None, {})  # a reference to the default group, its meshes


def same_mesh(device_type: str, dp: int, tp: int) -> DeviceMesh:
    """As `make_mesh`, but once: process groups live until the process ends, so each run of a Trainer must not make new ones."""
    global _made
    world = dist.group.WORLD
    if _made[0] is None or _made[0]() is not world:
        _made = (weakref.ref(world), {})
    meshes = _made[1]
    if (device_type, dp, tp) not in meshes:
        meshes[device_type, dp, tp] = make_mesh(device_type, dp, tp)
    return meshes[device_type, dp, tp]


def check_mesh(mesh: DeviceMesh) -> tuple[DeviceMesh, DeviceMesh]:
    """(its data-parallel axis, its tensor-parallel axis).

    Raises:
        TPError: for a mesh without these two axes.
    """
    names = mesh.mesh_dim_names or ()
    if tuple(names) != (DATA_PARALLEL, TENSOR_PARALLEL):
        raise TPError(
            f"The mesh has the axes {tuple(names)}; it needs ('{DATA_PARALLEL}', '{TENSOR_PARALLEL}'), in this order, as Lightning "
            f"names them: init_device_mesh(device, (dp, tp), mesh_dim_names=('{DATA_PARALLEL}', '{TENSOR_PARALLEL}'))."
        )
    if not dist.is_initialized():
        raise TPError("There is no process group. Start the ranks (a Trainer, torchrun) and make the mesh first.")
    wait_for_gloo_at_exit()
    return mesh[DATA_PARALLEL], mesh[TENSOR_PARALLEL]
