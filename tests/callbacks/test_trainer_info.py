from __future__ import annotations

from types import SimpleNamespace

from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_tp.callbacks.trainer_info import data_parallel_size, find_mesh, num_global_parameters
from lightning_tp.testing import fake_world


def test_mesh_counts_the_data_axis_once() -> None:
    with fake_world(8):
        mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("data_parallel", "tensor_parallel"))
        # hybrid FSDP: every rank has its own data
        other = init_device_mesh("cpu", (2, 4), mesh_dim_names=("replicate", "shard"))
        trainers = [
            SimpleNamespace(world_size=8, strategy=strategy)
            for strategy in (SimpleNamespace(device_mesh=mesh), SimpleNamespace(device_mesh=other), SimpleNamespace())
        ]
        assert [data_parallel_size(trainer) for trainer in trainers] == [2, 8, 8]  # type: ignore[arg-type]
        assert [find_mesh(trainer) for trainer in trainers] == [mesh, None, None]  # type: ignore[arg-type]


def test_strategy_knows_the_whole() -> None:
    """What the strategy says goes first, as a value or a method; a model of plain shards tells nothing by itself."""
    net = nn.Linear(3, 3)

    def asked(world_size: int = 2, **known: object) -> int | None:
        trainer = SimpleNamespace(world_size=world_size, strategy=SimpleNamespace(model=net, **known))
        return num_global_parameters(trainer, net)  # type: ignore[arg-type]

    assert asked(num_global_parameters=24) == 24
    assert asked(num_global_parameters=lambda: 24) == 24
    assert asked() is None
    assert asked(world_size=1) == 12
