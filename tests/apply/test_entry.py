"""Models are called as a whole or in parts, by forward or by other methods, and compute with the local view of their parameters inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_tp as ltp
from lightning_tp.apply.entry import entries
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.shards.view import depth
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks

PLAN = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise", "head": "vocab_head", "**": "replicate"}
IDS = torch.arange(24).view(2, 12) % 17


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.depths: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.depths.append(depth())
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(17, 8), nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 17, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x) * self.scale

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(ids))


def whole(model: Net) -> Tensor:
    return F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())


def in_parts(model: Net) -> Tensor:
    return F.cross_entropy(model.head(model.hidden(IDS)).flatten(0, 1), IDS.flatten())


def after_a_sample(model: Net) -> Tensor:
    with torch.no_grad():
        model(IDS[:, :3]).argmax(-1)
    return in_parts(model) + whole(model)


@pytest.mark.parametrize("mesh", [(1, 2), (2, 2)], ids=["tp2", "2x2"])
def test_parts_of_a_model_are_called_by_themselves(mesh: tuple[int, int]) -> None:
    """Steps of several kinds in turn, two backward passes in one of them; the gradient of a scalar is averaged over the data-parallel axis."""

    def body() -> list[int]:
        ref, model = randomize_(Net()), randomize_(Net())
        ltp.parallelize(model, make_mesh("cpu", *mesh), PLAN)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (ref, model)]
        for losses in ([in_parts], [whole], [after_a_sample], [whole, in_parts]):
            for m, optimizer in zip((ref, model), optimizers, strict=True):
                optimizer.zero_grad()
                for loss in losses:
                    loss(m).backward()
            assert_trees_close(ltp.full_gradients(model), {n: p.grad for n, p in ref.named_parameters()}, rtol=1e-4)
            for optimizer in optimizers:
                optimizer.step()
        assert_trees_close(ltp.full_state_dict(model), ref.state_dict(), rtol=1e-4)
        assert depth() == 0
        return [d for block in model.blocks for d in block.depths]

    for depths in run_ranks(body, 2 * mesh[0]):
        assert depths and (set(depths) == {1} if mesh[0] > 1 else set(depths) <= {0, 1})


def test_the_gradient_of_a_scalar_is_a_mean_over_the_data_parallel_axis() -> None:
    def body() -> float:
        model = randomize_(Net())
        mesh = make_mesh("cpu", 2, 1)
        ltp.parallelize(model, mesh, {"**": "replicate"})
        (whole(model) * (1 + mesh.get_rank())).backward()
        return float(ltp.full_gradients(model)["scale"])

    ref = randomize_(Net())
    whole(ref).backward()
    assert run_ranks(body, 2) == [pytest.approx(1.5 * float(ref.scale.grad), rel=1e-5)] * 2


def test_entries_are_the_outermost_modules_that_are_called() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.parts, self.act = Net(), nn.ModuleList([nn.Linear(2, 2), nn.ReLU()]), nn.GELU()

        def training_step(self, batch: Any) -> Any: ...

    step = Step()
    assert list(entries(step)) == [step.net, step.parts[0]]
    assert list(entries(step.net)) == [step.net]


def test_an_optimizer_steps_on_shards_and_calls_its_closure_outside() -> None:
    def body() -> None:
        ltp.parallelize(model := randomize_(Net()), make_mesh("cpu", 1, 2), PLAN)
        seen: list[int] = []

        class Own(torch.optim.Optimizer):
            def __init__(self, params: Any) -> None:
                super().__init__(params, {})

            def step(self, closure: Any = None) -> None:  # type: ignore[override]
                seen.append(depth())
                closure()
                seen.append(depth())

        Own(model.parameters()).step(lambda: seen.append(depth()))
        assert seen == [1, 0, 1] and depth() == 0

        def fail() -> None:
            raise KeyError

        with pytest.raises(KeyError):
            Own(model.parameters()).step(fail)
        assert depth() == 0
        Own(model.parameters()).step(lambda: seen.append(depth()))
        assert seen[4:] == [1, 0, 1] and depth() == 0

    run_ranks(body, 2)
