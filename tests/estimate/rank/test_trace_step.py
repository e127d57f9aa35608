from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_tp import TPError
from lightning_tp.estimate import estimate
from lightning_tp.estimate.rank.inputs import loss_of
from lightning_tp.estimate.rank.settings import PRECISIONS, Settings
from lightning_tp.estimate.rank.trace_step import block_kinds, shard_on_meta, trace_step
from lightning_tp.plan.plan import Plan
from tests.estimate.models import TOKENS, meta_llama


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 8), nn.Linear(8, 32, bias=False)
        self.head.weight = self.embed.weight
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.register_buffer("scale", torch.ones(1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x * self.scale)


RULES = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise", "**": "replicate"}
IDS = (torch.zeros(2, 4, dtype=torch.int64),)


def test_nothing_of_the_model_is_changed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)).eval()
    before, classes = {n: p.clone() for n, p in model.state_dict().items()}, [type(m) for m in model.modules()]
    estimate(model, (torch.ones(2, 4, 8),), (2, 2), loss_fn=lambda y: y.mean(), activation_checkpointing=lambda n, m: n == "0")
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert [type(m) for m in model.modules()] == classes and not model.training
    assert all(p.grad is None for p in model.parameters()) and not torch.distributed.is_initialized()


def test_a_rank_of_a_model() -> None:
    model = Net()
    plan = Plan(RULES).check(model, 2)
    found = trace_step(model, loss_of(None), IDS, plan, Settings(2, 2))
    assert found.units == ("blocks.0", "blocks.1", "blocks.2", "") and found.blocks == found.units[:-1]
    assert found.buffer_bytes == 4 and found.classes["blocks.1.up"] == "Linear" and found.classes[""] == "Net"
    assert found.trace.followed == {"blocks.0": "blocks.0", "blocks.1": "blocks.1", "blocks.2": "blocks.1"}
    matmuls = {op.module: op.shape for s in found.trace.segments for op in s.ops if op.kind == "product" and op.phase == "forward"}
    assert matmuls["blocks.1.up"] == (1, 8, 8, 8) and matmuls["blocks.1.down"] == (1, 8, 8, 8)  # half of 16 features
    sent = [(c.kind, c.phase) for s in found.trace.segments if s.block == "blocks.1" for c in s.collectives]
    assert sent == [("all-reduce", "forward"), ("all-reduce", "backward")]


def test_shards_on_the_meta_device() -> None:
    with torch.device("meta"):
        model, other = Net(), Net()
    plan = Plan(RULES).check(model, 4)
    shard_on_meta(model, plan, Settings(4, 2, precision=PRECISIONS["bf16-fsdp"]))
    assert model.blocks[0].up.weight.shape == (4, 8) and model.blocks[0].down.weight.shape == (8, 4)  # type: ignore[union-attr]
    assert model.head.weight is model.embed.weight and model.embed.weight.shape == (32, 8)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}  # as FSDP2 gathers them
    assert model.scale.dtype == torch.float32
    shard_on_meta(other, plan, Settings(4, 1, precision=PRECISIONS["bf16-fsdp"]))
    assert {p.dtype for p in other.parameters()} == {torch.float32}  # as they are held
    shard_on_meta(other, Plan({"**": "replicate"}).check(other, 1), Settings(1, 1, precision=PRECISIONS["64-true"]))
    assert {p.dtype for p in other.parameters()} == {other.scale.dtype} == {torch.float64}


def test_which_blocks_are_alike() -> None:
    def kinds(**changes: object) -> int:
        model = Net()
        for i, block in enumerate(model.blocks):
            block.number = i  # type: ignore[assignment]
            block.scale = 0.5 + i  # type: ignore[assignment]
        for name, value in changes.items():
            setattr(model.blocks[1], name, value)
        return len(set(block_kinds(model, Plan(RULES).check(Net(), 2)).values()))

    assert kinds() == 1  # each has its own number, and scales do not matter
    assert kinds(scale=0.0) == 2 and kinds(flag=True) == 2
    assert kinds(down=nn.Linear(16, 8).requires_grad_(False)) == 2
    first = Plan({"blocks.0.up": "colwise", "blocks.0.down": "rowwise", "**": "replicate"}).check(Net(), 2)
    assert len(set(block_kinds(Net(), first).values())) == 2  # other styles


class Decides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if x.sum() > 0:
                x = -x
        return x


def test_a_model_that_cannot_be_traced_says_where() -> None:
    with pytest.raises(TPError, match=r"reads the value of a tensor that depends on weights"):
        estimate(Decides(), (torch.ones(2, 4, 8),), (1, 1), loss_fn=lambda y: y.mean())

    class Raises(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).numpy()  # type: ignore[return-value]

    model = nn.Sequential(nn.Linear(8, 8), Raises(8, 8))
    with pytest.raises(TPError, match=r"`1` raised .*in the forward, tp=1"):
        estimate(model, (torch.ones(2, 4, 8),), (1, 1), loss_fn=lambda y: y.mean())


def test_a_loss_without_trainable_parameters() -> None:
    with pytest.raises(TPError, match="does not depend on any trainable parameter"):
        estimate(nn.Linear(8, 8).requires_grad_(False), (torch.ones(2, 8),), (1, 1), loss_fn=lambda y: y.mean())


def test_dtypes_that_do_not_go_together() -> None:
    with pytest.raises(TPError, match=r"multiplies bfloat16 and float32"):
        estimate(meta_llama(), TOKENS, (4, 2), precision="bf16-fsdp")  # the table of positions of this Llama is float32
