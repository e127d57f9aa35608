"""Sizes from a world, and the mesh whose axes have Lightning's names."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import lightning_tp as ltp
from lightning_tp.core.comm.mesh import DATA_PARALLEL, TENSOR_PARALLEL, check_mesh, make_mesh, mesh_sizes, same_mesh
from lightning_tp.testing import fake_world, run_ranks


@pytest.mark.parametrize(
    "tp, dp, world, per_node, sizes",
    [
        (2, "auto", 8, None, (4, 2)),
        (8, "auto", 8, 8, (1, 8)),
        (1, "auto", 3, None, (3, 1)),
        ("auto", 2, 8, None, (2, 4)),
        ("auto", 1, 6, 2, (1, 6)),
        ("auto", "auto", 16, 8, (2, 8)),
        ("auto", "auto", 4, None, (1, 4)),
        ("auto", "auto", 2, 8, (1, 2)),  # less than a node
        ("auto", "auto", 1, None, (1, 1)),
        (4, 2, 8, None, (2, 4)),
        (3, 2, 6, None, (2, 3)),
        (2, "auto", 2048, 8, (1024, 2)),
    ],
)
def test_sizes(tp: Any, dp: Any, world: int, per_node: int | None, sizes: tuple[int, int]) -> None:
    assert mesh_sizes(tp, dp, world, ranks_per_node=per_node) == sizes
    assert sizes[0] * sizes[1] == world


@pytest.mark.parametrize(
    "tp, dp, world, per_node, message",
    [
        (
            3,
            "auto",
            8,
            None,
            r"`tp=3` needs a multiple of 3 ranks, and the world size is 8. Use tp=1, 2, 4, 8, or another number of devices",
        ),
        (16, "auto", 8, None, r"`tp=16` needs a multiple of 16 ranks, and the world size is 8"),
        (2, 3, 8, None, r"`dp=3` x `tp=2` are 6 ranks, and the world size is 8. Leave one of them 'auto'.*or start 6 ranks"),
        (4, 4, 8, None, r"`dp=4` x `tp=4` are 16 ranks, and the world size is 8.*start 16 ranks"),
        ("auto", 3, 8, None, r"`dp=3` x `tp=\d+` are \d+ ranks, and the world size is 8"),
        ("auto", 16, 8, None, r"`dp=16` x `tp=\d+` are \d+ ranks, and the world size is 8"),
        (
            "auto",
            "auto",
            10,
            4,
            r"`tp='auto'` means the 4 ranks of a node, and the world size 10 is no multiple of that. Use tp=1, 2, 5, 10",
        ),
        (0, "auto", 8, None, r"`tp=0`: give a number of ranks, 1 or more, or 'auto'"),
        (-2, "auto", 8, None, r"`tp=-2`: give a number"),
        (2, 0, 8, None, r"`dp=0`: give a number"),
        (2.0, "auto", 8, None, r"`tp=2.0`: give a number"),
        ("2", "auto", 8, None, r"`tp='2'`: give a number"),
        (True, "auto", 8, None, r"`tp=True`: give a number"),
        (None, "auto", 8, None, r"`tp=None`: give a number"),
    ],
)
def test_sizes_that_do_not_make_up_the_world(tp: Any, dp: Any, world: int, per_node: int | None, message: str) -> None:
    with pytest.raises(ltp.TPError, match=message):
        mesh_sizes(tp, dp, world, ranks_per_node=per_node)


def test_the_names_are_those_that_lightning_slices_by() -> None:
    import inspect

    from lightning.fabric.strategies import model_parallel  # makes the mesh, for the Trainer too

    source = inspect.getsource(model_parallel)
    assert f'"{DATA_PARALLEL}"' in source and f'"{TENSOR_PARALLEL}"' in source


def test_ranks_of_a_tensor_parallel_group_are_neighbours() -> None:
    def body() -> tuple[Any, ...]:
        mesh = make_mesh("cpu", 2, 2)
        dp_mesh, tp_mesh = check_mesh(mesh)
        groups = [dist.get_process_group_ranks(m.get_group()) for m in (dp_mesh, tp_mesh)]
        return (*groups, mesh.get_local_rank(DATA_PARALLEL), mesh.get_local_rank(TENSOR_PARALLEL))

    assert run_ranks(body, 4) == [
        ([0, 2], [0, 1], 0, 0),
        ([1, 3], [0, 1], 0, 1),
        ([0, 2], [2, 3], 1, 0),
        ([1, 3], [2, 3], 1, 1),
    ]


def test_a_large_world() -> None:
    with fake_world(2048, rank=1029):
        mesh = make_mesh("cpu", 256, 8)
        dp_mesh, tp_mesh = check_mesh(mesh)
        assert (dp_mesh.size(), tp_mesh.size()) == (256, 8)
        assert (mesh.get_local_rank(DATA_PARALLEL), mesh.get_local_rank(TENSOR_PARALLEL)) == (128, 5)


@pytest.mark.parametrize("names", [None, ("dp", "tp"), (TENSOR_PARALLEL, DATA_PARALLEL)])
def test_a_mesh_with_other_axes(names: tuple[str, str] | None) -> None:
    with fake_world(4):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        with pytest.raises(ltp.TPError, match=r"The mesh has the axes .*'data_parallel', 'tensor_parallel'.*init_device_mesh"):
            check_mesh(mesh)
        if names:
            with pytest.raises(ltp.TPError, match=r"The mesh has the axes"):
                check_mesh(mesh[names[1]])


def test_a_mesh_of_ranks_that_are_gone() -> None:
    with fake_world(4):
        mesh = make_mesh("cpu", 2, 2)
    with pytest.raises(ltp.TPError, match=r"There is no process group. Start the ranks"):
        check_mesh(mesh)


def test_runs_share_a_mesh() -> None:
    """As long as the process group lives: a mesh of another one has groups that are gone."""

    def body() -> None:
        mesh = same_mesh("cpu", 1, 2)
        groups = len(dist.distributed_c10d._world.pg_map)
        assert same_mesh("cpu", 1, 2) is mesh and same_mesh("cpu", 2, 1) is not mesh
        assert same_mesh("cpu", 1, 2) is mesh and len(dist.distributed_c10d._world.pg_map) >= groups
        dist.destroy_process_group()
        dist.init_process_group("gloo")
        other = same_mesh("cpu", 1, 2)
        assert other is not mesh
        group = other.get_group(TENSOR_PARALLEL)
        dist.barrier(group)

    run_ranks(body, 2)
