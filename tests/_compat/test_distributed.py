"""What is wrapped of torch for process groups, DTensors and FSDP2, on this version."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_tp import _compat
from lightning_tp.core.comm.fake_world import fake_world
from lightning_tp.testing import run_ranks


def test_dtensors_and_their_pieces() -> None:
    with fake_world(2, rank=1):
        mesh = init_device_mesh("cpu", (2,))
        plain = torch.arange(10.0).view(5, 2)
        even = distribute_tensor(plain, mesh, [Shard(0)], src_data_rank=None)
        assert _compat.local_tensor(plain) is plain and _compat.local_tensor(even).shape == (2, 2)
        assert not _compat.is_in_pieces(even)
        ((offset, piece),) = _compat.pieces_of_dtensor(even)
        assert offset == (3, 0) and torch.equal(piece, plain[3:])
        pieces, offsets = [plain[1:2], plain[4:]], [(1, 0), (4, 0)]
        fused = _compat.dtensor_of_pieces(pieces, offsets, mesh, (Shard(0),), torch.Size((5, 2)))
        assert _compat.is_in_pieces(fused) and fused.shape == (5, 2) and fused.placements == (Shard(0),)
        for dtype in (torch.bfloat16, torch.float64, torch.int16):
            assert _compat.dtensor_of_pieces([p.to(dtype) for p in pieces], offsets, mesh, (Shard(0),), fused.shape).dtype == dtype
        assert [(o, p.tolist()) for o, p in _compat.pieces_of_dtensor(fused)] == [((1, 0), [[2, 3]]), ((4, 0), [[8, 9]])]
        names: list[str] = []
        for tensor in (even, fused):
            twin = _compat.copy_dtensor(tensor, lambda t, name: names.append(name) or t + 1)
            assert twin.placements == tensor.placements and twin.shape == tensor.shape
            for (a, x), (b, y) in zip(_compat.pieces_of_dtensor(tensor), _compat.pieces_of_dtensor(twin), strict=True):
                assert a == b and torch.equal(x + 1, y)
        assert names == ["", "0", "1"]
        strided = _compat.strided_shard(0, 2)
        assert strided.dim == 0 and strided.split_factor == 2 and type(strided).__name__ == "_StridedShard"


def test_units_that_are_frozen_at_first() -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    with fake_world(2):
        mesh = init_device_mesh("cpu", (2,))
        model = nn.Linear(4, 4)
        model.requires_grad_(False)
        fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.bfloat16))
        _compat.remember_dtypes(model)
        model(torch.ones(2, 4))
        model.requires_grad_(True)
        model(torch.ones(2, 4)).sum().backward()
        assert model.weight.grad is not None and model.weight.grad.dtype == torch.float32


def test_tensors_go_where_their_group_is() -> None:
    class Group:
        def __init__(self, *types: str) -> None:
            self._device_types = [torch.device(t) for t in types]

    host, meta = torch.ones(2), torch.ones(2, device="meta")
    assert all(_compat.on_device_of(Group(*types), host) is host for types in ((), ("cpu",), ("cuda", "cpu")))
    assert _compat.on_device_of(Group("meta"), host).device.type == "meta"
    assert _compat.on_device_of(Group("cpu"), meta) is meta


def test_process_groups() -> None:
    def body() -> None:
        dist.init_process_group("gloo")  # by the environment: over TCP
        rank, group = dist.get_rank(), dist.group.WORLD
        assert _compat.gather_rows(torch.tensor([[rank, 7]]), group).tolist() == [[[0, 7]], [[1, 7]]]
        store = _compat.clone_store()
        assert store is not None
        store.set(f"from {rank}", "here")
        dist.barrier()
        assert store.get(f"from {1 - rank}") == b"here"
        _compat.let_store_fail(timedelta(seconds=20))  # a healthy one goes on
        assert store.check([f"from {rank}"])
        _compat.limit_waiting([group], timedelta(seconds=1))
        if rank == 0:
            with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
                dist.all_reduce(torch.ones(1))  # the other does not come
            store.set("done", "")
        store.wait(["done"])

    run_ranks(body, 2, init=False)


def test_collectives_that_are_waited_for_at_once_stay_on_the_current_stream() -> None:
    """NCCL is told so, and may return nothing to wait for."""

    class Group:
        def __init__(self) -> None:
            self.told: list[Any] = []

        def __getattr__(self, name: str) -> Any:
            return lambda *args: self.told.append((name, args[-1].asyncOp, getattr(args[-1], "reduceOp", None)))

    group, x = Group(), torch.ones(2)
    _compat.all_reduce_into(x, group)
    _compat.all_reduce_into(x, group, largest=True)
    _compat.all_gather_into(torch.ones(4), x, group)
    _compat.reduce_scatter_into(x, torch.ones(4), group)
    assert [told[:2] for told in group.told] == [
        ("allreduce", False),
        ("allreduce", False),
        ("_allgather_base", False),
        ("_reduce_scatter_base", False),
    ]
    assert [told[2] for told in group.told] == [dist.ReduceOp.SUM, dist.ReduceOp.MAX, None, dist.ReduceOp.SUM]


def test_groups_count_their_collectives() -> None:
    """Alike on all ranks of a group, under the same name, and also where one rank only has begun one."""

    def body() -> Any:
        rank = dist.get_rank()
        half = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
        before = _compat.collective_counts()
        x = torch.ones(2)
        _compat.all_reduce_into(x, half)
        _compat.all_gather_into(torch.ones(8), x, dist.group.WORLD)
        work = dist.all_reduce(x, group=half, async_op=True) if rank == 0 else None
        after = _compat.collective_counts()
        if work is None and rank == 1:
            dist.all_reduce(x, group=half)
        dist.barrier()
        return {key: (count - before[key][0], name) for key, (count, name) in after.items()}

    zero, one, two, three = run_ranks(body, 4)
    assert two == three and set(zero) == set(one) != set(two)
    assert sorted(n for n, _ in zero.values()) == [1, 2] and sorted(n for n, _ in one.values()) == [1, 1]
    assert {name for _, name in two.values()} == {"group `default_pg` (ranks 0, 1, 2, 3)", "group `undefined` (ranks 2, 3)"}
    with fake_world(4):
        assert isinstance(_compat.collective_counts(), dict)


def test_groups_that_are_not_there() -> None:
    group = _compat.fake_process_group(3, 8)
    assert (group.rank(), group.size()) == (3, 8)
    group.allreduce([torch.ones(2)]).wait()
    assert _compat.fake_store() is not None
    with fake_world(2):
        assert _compat.clone_store() is None
        _compat.let_store_fail(timedelta(seconds=1))
