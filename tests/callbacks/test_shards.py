"""ShardSummary: in one process, and on two real ranks (this file run as a script) under tensor parallelism and DDP."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from lightning_tp.callbacks.shards import ShardSummary, ShardSummaryRow, num_global_parameters, optimizer_line, shard_table
from lightning_tp.callbacks.throughput import Throughput
from lightning_tp.data.random_tokens import RandomTokens

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
    """The lines that the two callbacks print, cells stripped of blanks."""
    lines = [" | ".join(cell.strip() for cell in line.split("|")) for line in output.splitlines()]
    return [x for x in lines if x.startswith(("Shards", "Optimizer state", "counted")) or x.count("|") == 5]


def adam_bytes(num_parameters: int, num_tensors: int = 5) -> str:
    """Two float32 moments for each parameter, one float32 step for each tensor."""
    return f"{(8 * num_parameters + 4 * num_tensors) / 1024:.1f} KiB"


def test_one_process_holds_everything(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Net(), ShardSummary())
    assert ours(capsys.readouterr().out) == [
        f"Shards of Net: {WHOLE} parameters in the whole model, 1 rank",
        "rank | data-parallel rank | tensor-parallel rank | parameters held | share of the whole | bytes",
        f"0 | 0 | 0 | {WHOLE} | 100.0% | {4 * WHOLE / 1024:.1f} KiB",
        f"Optimizer state after the first step: {adam_bytes(WHOLE)} on every rank",
    ]


def test_optimizer_is_counted_after_its_first_step(capsys: pytest.CaptureFixture[str]) -> None:
    """Not after the first batch, when gradients are accumulated and there is no state yet; again in a second fit."""
    callback = ShardSummary()
    for _ in range(2):
        fit(Net(), callback, accumulate_grad_batches=3)
        assert ours(capsys.readouterr().out)[-1].endswith(f"{adam_bytes(WHOLE)} on every rank")


def test_two_ranks() -> None:
    """Tensor parallel: a batch counts once, a rank holds half of the MLP. DDP: a batch counts twice, ranks hold all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parents[2]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    env |= {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}  # as torchrun would start them
    env |= {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        (first, error), (second, second_error) = [process.communicate(timeout=120) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], error + second_error
    held = WHOLE - SPLIT // 2
    head = "rank | data-parallel rank | tensor-parallel rank | parameters held | share of the whole | bytes"
    assert ours(first) == [
        f"Shards of Net: {WHOLE} parameters in the whole model, 2 ranks",
        head,
        f"0 | 0 | 0 | {held} | {100 * held / WHOLE:.1f}% | {4 * held / 1024:.1f} KiB",
        f"1 | 0 | 1 | {held} | {100 * held / WHOLE:.1f}% | {4 * held / 1024:.1f} KiB",
        f"Optimizer state after the first step: {adam_bytes(held)} on every rank",
        f"counted {7 * 3 * 8} tokens in 7 steps",  # 24 items in batches of 3, one step of warmup, each rank sees all
        f"Shards of Net: {WHOLE} parameters in the whole model, 2 ranks",
        head,
        f"0 | 0 | 0 | {WHOLE} | 100.0% | {4 * WHOLE / 1024:.1f} KiB",
        f"1 | 1 | 0 | {WHOLE} | 100.0% | {4 * WHOLE / 1024:.1f} KiB",
        f"Optimizer state after the first step: {adam_bytes(WHOLE)} on every rank",
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


def test_strategy_knows_the_whole() -> None:
    """What the strategy says goes first, as a value or a method; a model of plain shards tells nothing by itself."""
    net = nn.Linear(3, 3)

    def asked(**said: object) -> int | None:
        trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace(model=net, **said))
        return num_global_parameters(trainer, net)  # type: ignore[arg-type]

    assert asked(num_global_parameters=24) == 24
    assert asked(num_global_parameters=lambda: 24) == 24
    assert asked() is None


def test_table_of_many_ranks_and_unknown_whole() -> None:
    held = [ShardSummaryRow(rank, rank // 4, rank % 4, 1000 + rank, 4 * (1000 + rank)) for rank in range(12)]
    lines = shard_table(held, None, max_rows=3).splitlines()
    assert lines[0] == "Shards of the model: an unknown number of parameters in the whole model, 12 ranks"
    assert [cell.strip() for cell in lines[4].split("|")] == ["2", "0", "2", "1,002", "-", "3.9 KiB"]
    assert lines[5:] == ["... 9 more ranks; 1,000 to 1,011 parameters on a rank"]
    assert len({len(line) for line in lines[1:5]}) == 1  # columns line up


@pytest.mark.parametrize(
    ("num_bytes", "said"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 * 2**29, "1.5 GiB"), (2**51, "2048.0 TiB")],
)
def test_bytes_are_readable(num_bytes: int, said: str) -> None:
    assert optimizer_line([num_bytes, num_bytes]).endswith(f": {said} on every rank")


def test_uneven_optimizer_state_shows_both_ends() -> None:
    assert optimizer_line([2048, 0, 1024]).endswith(": 0 B to 2.0 KiB on a rank")


if __name__ == "__main__":
    on_each_rank()
