"""Random numbers of the ranks: equal inside a tensor-parallel group, different over the data-parallel axis."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_tp as ltp
from lightning_tp.mesh import DATA_PARALLEL, make_mesh
from lightning_tp.rng import seed_mesh
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks


@pytest.mark.parametrize("seeded", ["alike", "each by its rank", "not at all"])
def test_streams_of_the_ranks(seeded: str) -> None:
    def body() -> Tensor:
        mesh = make_mesh("cpu", 2, 2)
        if seeded != "not at all":
            torch.manual_seed(dist.get_rank() if seeded == "each by its rank" else 0)
        seed_mesh(mesh)
        return torch.randn(4)

    a, b, c, d = run_ranks(body, 4)
    assert torch.equal(a, b) and torch.equal(c, d) and not torch.equal(a, c)
    if seeded != "not at all":
        torch.manual_seed(0)
        assert torch.equal(a, torch.randn(4))


def test_the_first_goes_on_as_one_process() -> None:
    """From where it stands, not from its seed."""

    def body() -> Tensor:
        torch.manual_seed(5)
        torch.randn(dist.get_rank() * 7 + 3)
        seed_mesh(make_mesh("cpu", 2, 1))
        return torch.randn(4)

    first, second = run_ranks(body, 2)
    torch.manual_seed(5)
    torch.randn(3)
    assert torch.equal(first, torch.randn(4)) and not torch.equal(first, second)


class Net(nn.Module):
    """Dropout on whole activations, between split layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.dropout(self.embed(tokens), 0.5, self.training)
        return self.head(F.dropout(self.down(self.up(x).relu()), 0.5, self.training))


def test_dropout_of_whole_activations_is_that_of_one_process() -> None:
    plan = {"embed": "vocab_embedding", "up": "colwise", "down": "rowwise", "head": "vocab_head"}
    tokens = torch.arange(12).view(2, 6) % 11

    def loss(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())

    whole = randomize_(Net())
    torch.manual_seed(1)
    ref = loss(whole)
    ref.backward()

    def body() -> None:
        mesh = make_mesh("cpu", 1, 2)
        model = ltp.parallelize(randomize_(Net()), mesh, plan)
        torch.manual_seed(1 + dist.get_rank())
        seed_mesh(mesh)
        out = loss(model)
        assert out.item() == pytest.approx(ref.item(), rel=1e-5)
        out.backward()
        assert_trees_close(ltp.full_gradients(model), ltp.full_gradients(whole), rtol=1e-4)
        assert mesh.get_local_rank(DATA_PARALLEL) == 0

    run_ranks(body, 2)
