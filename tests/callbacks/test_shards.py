"""ShardSummary: in one process, and on two real ranks under tensor parallelism and DDP."""

from __future__ import annotations

import re
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from lightning_tp.callbacks.shards import (
    ShardSummary,
    ShardSummaryRow,
    find_mesh,
    num_global_parameters,
    optimizer_line,
    shard_table,
)
from lightning_tp.callbacks.throughput import Throughput
from lightning_tp.data.random_tokens import RandomTokens
from lightning_tp.testing import fake_world, run_ranks

SPLIT = 8 * 32 + 32 + 32 * 8  # up.weight, up.bias, down.weight
WHOLE = SPLIT + 16 * 8 + 8  # embedding, down.bias


class Net(L.LightningModule):
    """An embedding and an MLP; whole, or split by PyTorch's own styles."""

    def __init__(self, split: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.mlp = nn.ModuleDict({"up": nn.Linear(8, 32), "down": nn.Linear(32, 8)})
        self.split = split

    def configure_model(self) -> None:
        if self.split:
            assert self.device_mesh is not None
            styles = {"mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()}
            parallelize_module(self, self.device_mesh["tensor_parallel"], styles)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.mlp["down"](self.mlp["up"](self.embedding(batch["tokens"])).relu()).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def fit(net: Net, *callbacks: L.Callback, devices: int = 1, strategy: Strategy | str = "auto", **kwargs: int) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **kwargs,  # type: ignore[arg-type]
    )
    trainer.fit(net, DataLoader(RandomTokens(24, 8, 16), batch_size=3))


def ours(output: str) -> list[str]:
    """The lines that the two callbacks print; cells of the table with one bar between them."""
    lines = [" | ".join(re.split(" {2,}", line.strip())) for line in output.splitlines()]
    return [x for x in lines if x.startswith(("Shards", "Optimizer state", "counted")) or x.count(" | ") == 5]


def adam_bytes(num_parameters: int, num_tensors: int = 5) -> str:
    """Two float32 moments for each parameter, one float32 step for each tensor."""
    return f"{(8 * num_parameters + 4 * num_tensors) / 1024:.1f} KiB"


def test_one_process_holds_everything(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Net(), ShardSummary())
    assert ours(capsys.readouterr().out) == [
        f"Shards of Net: {WHOLE} parameters in total, 1 rank",
        "rank | dp rank | tp rank | parameters | share | size",
        f"0 | 0 | 0 | {WHOLE} | 100.0% | {4 * WHOLE / 1024:.1f} KiB",
        f"Optimizer state after the first step: {adam_bytes(WHOLE)} per rank",
    ]


def test_optimizer_is_counted_after_its_first_step(capsys: pytest.CaptureFixture[str]) -> None:
    """Not after the first batch, when gradients are accumulated and there is no state yet; again in a second fit."""
    callback = ShardSummary()
    for _ in range(2):
        fit(Net(), callback, accumulate_grad_batches=3)
        assert ours(capsys.readouterr().out)[-1].endswith(f"{adam_bytes(WHOLE)} per rank")


@pytest.mark.only_on_cpu("compares the screen, where Lightning says whether there are GPUs")
def test_two_ranks() -> None:
    """Tensor parallel: a batch counts once, a rank holds half of the MLP. DDP: a batch counts twice, ranks hold all."""
    (_, first), (_, second) = run_ranks(on_each_rank, 2, init=False, return_output=True)
    held = WHOLE - SPLIT // 2
    head = "rank | dp rank | tp rank | parameters | share | size"
    assert ours(first) == [
        f"Shards of Net: {WHOLE} parameters in total, 2 ranks",
        head,
        f"0 | 0 | 0 | {held} | {100 * held / WHOLE:.1f}% | {4 * held / 1024:.1f} KiB",
        f"1 | 0 | 1 | {held} | {100 * held / WHOLE:.1f}% | {4 * held / 1024:.1f} KiB",
        f"Optimizer state after the first step: {adam_bytes(held)} per rank",
        f"counted {7 * 3 * 8} tokens in 7 steps",  # 24 items in batches of 3, one step of warmup, each rank sees all
        f"Shards of Net: {WHOLE} parameters in total, 2 ranks",
        head,
        f"0 | 0 | 0 | {WHOLE} | 100.0% | {4 * WHOLE / 1024:.1f} KiB",
        f"1 | 1 | 0 | {WHOLE} | 100.0% | {4 * WHOLE / 1024:.1f} KiB",
        f"Optimizer state after the first step: {adam_bytes(WHOLE)} per rank",
        f"counted {3 * 3 * 8 * 2} tokens in 3 steps",  # a rank sees half of the items, the ranks together all
    ]
    assert [line for line in ours(second) if not line.startswith("counted")] == []  # rank 0 alone prints


def on_each_rank() -> None:
    """What a rank of `test_two_ranks` does."""
    tensor_parallel = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    for net, strategy in ((Net(split=True), tensor_parallel), (Net(), DDPStrategy())):
        throughput = Throughput(warmup=1)
        fit(net, ShardSummary(), throughput, devices=2, strategy=strategy)
        assert throughput.speed is not None
        print(f"counted {throughput.speed.num_tokens} tokens in {throughput.speed.num_steps} steps")


def test_table_of_many_ranks_and_unknown_whole() -> None:
    held = [ShardSummaryRow(rank, rank // 4, rank % 4, 1000 + rank, 4 * (1000 + rank)) for rank in range(12)]
    lines = shard_table(held, None, max_rows=3).splitlines()
    assert lines[0] == "Shards of the model: an unknown number of parameters in total, 12 ranks"
    assert re.split(" {2,}", lines[4].strip()) == ["2", "0", "2", "1,002", "-", "3.9 KiB"]
    assert lines[5:] == ["  .. and 9 more ranks; 1,000 to 1,011 parameters per rank"]
    assert len({len(line) for line in lines[1:5]}) == 1  # columns line up


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (3 * 2**29, "1.50 GiB"), (2**51, "2048.00 TiB")],
)
def test_bytes_are_readable(num_bytes: int, text: str) -> None:
    assert optimizer_line([num_bytes, num_bytes]).endswith(f": {text} per rank")


def test_uneven_optimizer_state_shows_both_ends() -> None:
    assert optimizer_line([2048, 0, 1024]).endswith(": 0 bytes to 2.0 KiB per rank")


def test_mesh_counts_the_data_axis_once() -> None:
    with fake_world(8):
        mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("data_parallel", "tensor_parallel"))
        # hybrid FSDP: every rank has its own data
        other = init_device_mesh("cpu", (2, 4), mesh_dim_names=("replicate", "shard"))
        trainers = [
            SimpleNamespace(world_size=8, strategy=strategy)
            for strategy in (SimpleNamespace(device_mesh=mesh), SimpleNamespace(device_mesh=other), SimpleNamespace())
        ]
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
