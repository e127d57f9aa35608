"""What a step may do while its plan is found: all that it may do in training, and nothing of it stays."""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

import lightning_tp as ltp
from lightning_tp.core import forked
from lightning_tp.testing import run_ranks
from lightning_tp.trainer import module_plan

QUIET = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)


class Points(Dataset):
    """(item, points): a sampler gives (index, length)."""

    def __getitem__(self, key: Any) -> Tensor:
        index, length = key
        return torch.randn(16, generator=torch.Generator().manual_seed(index)) * length


class Counter:
    n = 0


class Busy(L.LightningModule):
    """Does in one step what steps do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.metric, self.counter, self.scales = MeanMetric(), Counter(), iter([0.2, 0.5, 0.9, 1.3])
        self.register_buffer("labels", torch.arange(4))
        self.seen: list[Any] = []

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> dict[str, Tensor]:
        return {"x": batch}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        every = self.all_gather(x := batch.pop("x"), sync_grads=True)
        assert every.shape == (self.trainer.strategy.sizes[0], 4, 16)
        dist.all_reduce(torch.ones(1))
        dist.barrier()
        out = self.net(x)
        loss = out.square().mean() + F.cross_entropy(out @ x.T, self.labels)
        (gradient,) = torch.autograd.grad(loss, self.net[0].weight, retain_graph=True)
        loss = loss * next(self.scales) * (random.random() + np.random.rand() + float(gradient.norm().detach() > 0))
        self.metric.update(loss.detach())
        self.counter.n += 1
        optimizer.zero_grad()
        self.manual_backward(loss)
        norm = torch.stack([p.grad.norm() for p in self.parameters()]).norm()
        optimizer.step()
        scheduler.step()
        print("in a step")
        self.seen.append((float(loss), float(norm), self.counter.n, float(self.metric.compute())))
        self.seen.append(self.trainer.estimated_stepping_batches)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def trained(strategy: Any, devices: int) -> list[Any]:
    L.seed_everything(3, verbose=False)
    module = Busy()
    loader = DataLoader(Points(), batch_size=4, sampler=[(i, 1.0) for i in range(8)])  # type: ignore[arg-type]
    L.Trainer(accelerator="cpu", devices=devices, strategy=strategy, max_epochs=1, **QUIET).fit(module, loader)
    return module.seen


@pytest.mark.parametrize("forks", [True, False])
def test_a_step_that_does_all_that_steps_do(forks: bool) -> None:
    """Also where the plan is found in this very process."""

    def body() -> list[Any]:
        if not forks:
            module_plan.in_child = _no_child
        return trained(ltp.TPStrategy(tp=2), 2)

    def alone() -> list[Any]:
        return trained(ltp.TPStrategy(tp=1), 1)

    (first, second), (one,) = run_ranks(body, 2, init=False), run_ranks(alone, 1, init=False)
    assert len(one) == 4 and first == second
    for a, b in zip(first, one, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def _no_child(work: Any) -> Any:
    raise forked.NoChild("on purpose")


def plan_of(module: L.LightningModule) -> tuple[list[str], str]:
    trainer = L.Trainer(accelerator="cpu", devices=1, strategy=ltp.TPStrategy(tp=1), max_epochs=1, **QUIET)
    trainer.strategy.connect(module)
    module.trainer = trainer
    trainer._data_connector.attach_data(module, train_dataloaders=DataLoader(torch.randn(8, 16), batch_size=4))  # type: ignore[arg-type]
    trainer.state.fn, trainer.training = TrainerFn.FITTING, True
    plan = module_plan.plan_of_module(module, trainer, 2)
    return [repr(e.style) for e in plan.check(module, 2).entries], plan.source


def test_an_example_hides_nothing_that_the_step_reads() -> None:
    class Reads(L.LightningModule):
        def __init__(self, *, broken: bool = False) -> None:
            super().__init__()
            self.net, self.broken = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)), broken
            self.example_input_array = torch.zeros(4, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if self.broken:
                raise LookupError("no such thing")
            hidden = self.net[0](batch).flatten().sort()[0]
            return self.net(batch).square().mean() * hidden[0]

        def on_train_start(self) -> None:
            self.started = True

    with pytest.raises(ltp.TPError, match="would replicate every parameter"):
        plan_of(Reads())
    by_forward, source = plan_of(Reads(broken=True))
    assert by_forward[0].startswith("Colwise")
    assert source.endswith("of `forward` on `example_input_array`, since `training_step` raised LookupError: no such thing")


def test_a_step_that_asks_for_its_device_runs_where_the_weights_are() -> None:
    """Lightning has a module say that it is on the Trainer's device before it is moved there."""

    class Asks(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net(batch + torch.ones(16, device=self.device)).square().mean()

    class Outer(Asks):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Asks()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.inner.training_step(batch, batch_idx) + super().training_step(batch, batch_idx)

    module = Outer()
    module._device = module.inner._device = torch.device("cuda", 1)  # type: ignore[assignment]
    assert len(plan_of(module)[0]) >= 4
    assert module.device == module.inner.device == torch.device("cuda", 1)
