"""Steps that call a part of their model by itself, from the first batch or later on, train as in one process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_tp as ltp
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks

PLAN = {
    "net.blocks.*.up": "colwise",
    "net.blocks.*.down": "rowwise",
    "net.head": "vocab_head",
    "**": "replicate",
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 20), nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(17, 8), nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 17, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def up(net: Net, ids: Tensor) -> Tensor:
    return net.blocks[0].up(net.embed(ids)).square().mean()  # type: ignore[operator]


def down(net: Net, ids: Tensor) -> Tensor:
    return net.blocks[1].down(F.pad(net.embed(ids), (0, 12))).square().mean()  # type: ignore[operator]


def norm(net: Net, ids: Tensor) -> Tensor:
    return net.blocks[0].norm(net.embed(ids)).sin().mean()  # type: ignore[operator]


def block(net: Net, ids: Tensor) -> Tensor:
    return net.blocks[1](net.embed(ids)).square().mean()


def head(net: Net, ids: Tensor) -> Tensor:
    return net.head(net.embed(ids)).logsumexp(-1).mean()


def chain(net: Net, ids: Tensor) -> Tensor:
    x = net.embed(ids)
    for layer in net.blocks:
        x = layer(x)
    return F.cross_entropy(net.head(net.norm(x)).flatten(0, 1), ids.flatten())


class Module(L.LightningModule):
    """Calls a part by itself in its steps from `start` on, or in validation."""

    def __init__(self, part: Callable[[Net, Tensor], Tensor], start: int | None) -> None:
        super().__init__()
        self.net, self.part, self.start = randomize_(Net(), 0), part, start
        self.losses: list[float] = []
        self.steps = 0

    def training_step(self, batch: Tensor) -> Tensor:
        loss = F.cross_entropy(self.net(batch).flatten(0, 1), batch.flatten())
        if self.start is not None and self.trainer.global_step >= self.start:
            loss = loss + self.part(self.net, batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor) -> None:
        if self.start is None:
            self.losses.append(self.part(self.net, batch).item())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3)


PARTS = (up, down, norm, block, head, chain)


def fit(part: Any, start: int | None, mesh: tuple[int, int] | None, plan: Any) -> tuple[list[float], dict[str, Tensor]]:
    module = Module(part, start)
    strategy: Any = "auto" if mesh is None else ltp.TPStrategy(tp=mesh[1], dp=mesh[0], plan=plan)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1 if mesh is None else mesh[0] * mesh[1],
        strategy=strategy,
        max_steps=4,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,  # every rank has the same batches
    )
    data = DataLoader(torch.randint(0, 17, (8, 6), generator=torch.Generator().manual_seed(0)), batch_size=2)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*run unsplit.*")
        trainer.fit(module, data, data)
    return module.losses, ltp.full_state_dict(module)


@pytest.mark.parametrize(
    ("mesh", "given"),
    [((1, 2), False), pytest.param((1, 2), True, marks=pytest.mark.slow), pytest.param((2, 2), False, marks=pytest.mark.slow)],
)
def test_as_in_one_process(mesh: tuple[int, int], given: bool) -> None:
    cases = [
        (part, start) for part in PARTS for start in (0, 2, None) if start != 0 or part not in (up, down)
    ]  # a plan for these is refused
    found = run_ranks(
        lambda: [fit(part, start, mesh, PLAN if given else None) for part, start in cases],
        mesh[0] * mesh[1],
        init=False,
        timeout=280,
    )[0]
    for (part, start), (losses, weights) in zip(cases, found, strict=True):
        wanted, wanted_weights = fit(part, start, None, None)
        name = f"{part.__name__} from {start}"
        torch.testing.assert_close(
            torch.tensor(losses), torch.tensor(wanted), rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
        assert_trees_close(weights, wanted_weights, rtol=1e-4, name=name)
