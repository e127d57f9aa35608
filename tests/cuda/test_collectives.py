"""Tensors on the host in runs whose collectives are NCCL's, which takes none: they travel over the ranks' devices, and come back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torchmetrics import MeanMetric

import lightning_tp as ltp
from lightning_tp._compat import full_tensor, gather_rows
from lightning_tp.checkpoint.single_file import save_single_file
from lightning_tp.checkpoint.storage.path import StoragePath
from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.core.comm.state import S
from lightning_tp.core.ops.logits_rules import split_logits
from lightning_tp.core.ops.stream_shard import stream_shard
from lightning_tp.shards.shard import ParamShard
from lightning_tp.styles import Split
from lightning_tp.testing import randomize_, run_ranks
from lightning_tp.trainer.adapt.metrics import GatherOverDataParallel, all_gather, reduce_over

PLAN = {"*0": "colwise", "*2": "rowwise", "**": "replicate"}
QUIET: dict[str, Any] = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)


def mesh(dp: int = 1, tp: int = 2) -> DeviceMesh:
    return make_mesh("cuda", dp, tp)


def net() -> nn.Sequential:
    return randomize_(nn.Sequential(nn.Linear(8, 34), nn.GELU(), nn.Linear(34, 8), nn.LayerNorm(8)))


def test_rows_and_shards_on_the_host() -> None:
    def body() -> None:
        rank, group = dist.get_rank(), dist.group.WORLD
        rows = gather_rows(torch.tensor([rank, 7]), group)
        assert rows.tolist() == [[0, 7], [1, 7]] and rows.device.type == "cpu"
        shard = ParamShard("w", Split(S(1), ranges=(((0, 1), (3, 4)), ((1, 3),))), (2, 4), mesh())  # in pieces
        whole = torch.arange(8.0).view(2, 4)
        for device in ("cpu", torch.device("cuda", rank)):
            full = shard.gather(shard.take(whole.to(device)))
            assert full.device == torch.device(device) and torch.equal(full.cpu(), whole)
        rows_of_two = DTensor.from_local(
            whole[rank : rank + 1].cuda(), mesh(2, 1)["data_parallel"], [Shard(0)], run_check=False
        ).to("cpu")
        assert torch.equal(full_tensor(rows_of_two), whole) and full_tensor(rows_of_two).device.type == "cpu"

    run_ranks(body, 2, backend="nccl")


def test_a_model_is_read_and_moved_between_its_split_and_its_device() -> None:
    def body() -> None:
        ref, model = net(), ltp.parallelize(net(), mesh(), PLAN)
        assert all(torch.equal(t, ref.state_dict()[n]) for n, t in ltp.full_state_dict(model).items())
        torch.testing.assert_close(model[0].weight.norm(), ref[0].weight.norm())
        model[2].weight.data.mul_(2)
        model.cuda()
        assert model[2].weight.device == torch.device("cuda", dist.get_rank())
        assert torch.equal(ltp.full_state_dict(model)["2.weight"], ref[2].weight * 2)

    run_ranks(body, 2, backend="nccl")


@pytest.mark.parametrize("there", [False, True], ids=["on the host", "on the GPU"])
def test_one_file_wherever_shards_lie(there: bool, tmp_path: Path) -> None:
    """Pieces say that they are on the host, and states of optimizers may be there; no backend is asked for a dtype."""

    def body() -> None:
        whole = torch.arange(24).view(6, 4)
        splits = {"even": Split(S(0), ranges=(((0, 3),), ((3, 6),))), "pieces": Split(S(0), ranges=(((0, 1), (4, 6)), ((1, 4),)))}
        state = {}
        for name, split in splits.items():
            shard = ParamShard(name, split, (6, 4), mesh())
            for dtype in (torch.float32, torch.int16, torch.complex64, torch.bool):
                local = shard.take(whole.to(dtype))
                state[f"{name}.{dtype}"] = shard.to_dtensor(local.cuda() if there else local)
        save_single_file(state, StoragePath(tmp_path / "a.ckpt"))
        dist.barrier()
        for name, got in torch.load(tmp_path / "a.ckpt").items():
            assert got.device.type == "cpu" and torch.equal(got, whole.to(got.dtype)), name

    run_ranks(body, 2, backend="nccl")


def test_numbers_of_the_host_are_reduced_and_gathered() -> None:
    def body() -> None:
        rank, group = dist.get_rank(), mesh(2, 1).get_group("data_parallel")
        for device in ("cpu", torch.device("cuda", rank)):
            x = torch.tensor([1.0 + rank, 2.0], device=device)
            for got, expected in (
                (reduce_over(x.clone(), group, "mean"), [1.5, 2.0]),
                (reduce_over(x.long(), group, "sum"), [3, 4]),
                (all_gather(x, group), [[1.0, 2.0], [2.0, 2.0]]),
                (torch.stack(GatherOverDataParallel(group)(x)), [[1.0, 2.0], [2.0, 2.0]]),
                (torch.stack(GatherOverDataParallel(group)(x[: 1 + rank])[::-1][:1]), [[2.0, 2.0]]),  # of other lengths
            ):
                assert got.device == x.device and got.tolist() == expected
            y = x.requires_grad_()
            (all_gather(y, group, sync_grads=True) * (1 + rank)).sum().backward()
            assert y.grad is not None and y.grad.device == y.device and y.grad.tolist() == [3, 3]
        metric = MeanMetric(dist_sync_fn=GatherOverDataParallel(group))
        metric.update(torch.tensor(float(rank)))
        assert float(metric.compute()) == 0.5

    run_ranks(body, 2, backend="nccl")


def test_streams_and_logits_are_moved_in_full() -> None:
    def body() -> None:
        rank, axis = dist.get_rank(), Axis(mesh().get_group("tensor_parallel"))
        whole = torch.arange(12.0).view(1, 4, 3)
        local = whole[:, 2 * rank : 2 * rank + 2].cuda()
        for move in (lambda x: x.cpu(), lambda x: x.to("cpu"), lambda x: x.type(torch.FloatTensor), lambda x: x.to(whole)):
            moved: Tensor = move(stream_shard(local.clone(), axis, 4))
            assert type(moved) is Tensor and moved.device.type == "cpu" and torch.equal(moved, whole)
        assert stream_shard(local.clone(), axis, 4).to(torch.float64).shape == whole.shape
        columns = whole[..., : 2 if rank == 0 else 1] if rank == 0 else whole[..., 2:]
        for move in (lambda x: x.cpu(), lambda x: x.to("cpu"), lambda x: x.to(whole)):
            assert torch.equal(move(split_logits(columns.cuda(), axis, 3)), whole)

    run_ranks(body, 2, backend="nccl")


class Draws(L.LightningModule):
    """Draws on the host in a step, and in the model."""

    def __init__(self, draw: Callable[[Tensor], Tensor], *, in_model: bool) -> None:
        super().__init__()
        L.seed_everything(3, verbose=False)
        self.net, self.draw, self.in_model = Drawing(draw if in_model else None), draw, in_model
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, i: int) -> Tensor:
        y = self.net(batch)
        if not self.in_model:
            y = y * self.draw(torch.ones(8)).to(y.device)
        loss = F.mse_loss(y, batch)
        self.losses.append(float(loss))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Drawing(nn.Module):
    def __init__(self, draw: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.layers, self.draw = net(), draw

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return y if self.draw is None else y + self.draw(torch.ones(8)).to(y.device)


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "multinomial": lambda w: torch.multinomial(w, 8, replacement=True).float(),
    "poisson": torch.poisson,
    "dropout": lambda w: F.dropout(w, 0.4),
    "noise": lambda w: w * torch.rand_like(w),
}


@pytest.mark.parametrize("how", ["independent", "exact"])
@pytest.mark.parametrize("in_model", [False, True], ids=["in the step", "in the model"])
@pytest.mark.parametrize("name", DRAWS)
def test_draws_on_the_host_are_those_of_one_process(name: str, in_model: bool, how: Any) -> None:
    def body(tp: int) -> list[float]:
        module = Draws(DRAWS[name], in_model=in_model)
        data = torch.randn(8, 2, 8, generator=torch.Generator().manual_seed(0))
        strategy: Any = ltp.TPStrategy(
            tp=tp, plan={f"net.layers.{k[1:]}" if k != "**" else k: v for k, v in PLAN.items()}, dropout=how
        )
        trainer = L.Trainer(accelerator="gpu", devices=tp, strategy=strategy if tp > 1 else "auto", max_steps=6, **QUIET)
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
        return module.losses

    one, two = (run_ranks(body, tp, tp, init=False)[0] for tp in (1, 2))
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), rtol=1e-4, atol=1e-6)
