"""Random streams of the ranks: equal inside a tensor-parallel group, different over the data-parallel axis; own ones; saved ones."""

from __future__ import annotations

import random
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_tp as ltp
from lightning_tp.core.comm.mesh import DATA_PARALLEL, make_mesh
from lightning_tp.core.ops.rng import (
    DeviceState,
    local_state,
    local_state_restored,
    on_rank_stream,
    rng_state,
    seed_mesh,
    seed_torch,
    set_shared_state,
    share_random_states,
)
from lightning_tp.testing import assert_trees_close, fake_world, randomize_, run_ranks
from lightning_tp.testing.fixtures import run_if


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


def test_python_and_numpy_draw_the_same_on_all_ranks() -> None:
    def body() -> list[tuple[float, ...]]:
        rank = dist.get_rank()
        random.seed(rank), numpy.random.seed(rank), torch.manual_seed(rank)
        share_random_states(mesh := make_mesh("cpu", 2, 2))
        at_start = torch.rand(()).item(), random.random(), float(numpy.random.rand())
        random.seed(rank), numpy.random.seed(rank)
        seed_mesh(mesh)
        return [at_start, (random.random(), float(numpy.random.rand()))]

    ranks = run_ranks(body, 4)
    assert all(of_rank == ranks[0] for of_rank in ranks)
    torch.manual_seed(0)
    assert ranks[0][0][0] == torch.rand(()).item() and ranks[0][1][0] == random.Random(0).random()


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

    def body() -> None:
        whole = randomize_(Net())
        torch.manual_seed(1)
        ref = loss(whole)
        ref.backward()
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


def test_streams_go_on_in_a_later_run() -> None:
    """The streams further along the data-parallel axis, too, until somebody seeds anew."""

    def body() -> list[list[float]]:
        mesh = make_mesh("cpu", 2, 2)

        def run() -> list[float]:
            share_random_states(mesh)
            seed_mesh(mesh)
            return torch.rand(4).tolist()

        torch.manual_seed(5)
        first, second = run(), run()
        seed_mesh(mesh)  # as in the setup of a second module
        third = torch.rand(4).tolist()
        torch.manual_seed(5)
        return [first + second + third, run() + run()]

    ranks = run_ranks(body, 4)
    for dp_rank, seed in enumerate((5, 6)):
        torch.manual_seed(seed)
        expected = [x for _ in range(3) for x in torch.rand(4).tolist()]
        for went_on, again in ranks[2 * dp_rank : 2 * dp_rank + 2]:
            assert went_on == expected and again == expected[:8]


def test_seeding_and_restoring_leave_other_streams() -> None:
    state = local_state()
    with local_state_restored():
        seed_torch(3)
        assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(3)))
        random.random(), numpy.random.rand()
    after = local_state()
    assert torch.equal(after["cpu"], state["cpu"]) and after["python"] == state["python"]
    assert torch.equal(after["numpy"][1], state["numpy"][1]) and after["numpy"][2] == state["numpy"][2]


def test_a_state_of_no_device_changes_nothing() -> None:
    if torch.cuda.is_initialized():
        pytest.skip("CUDA is in use in this process")
    state = torch.get_rng_state()
    with DeviceState().again():
        torch.rand(2)
    assert not torch.equal(state, torch.get_rng_state())


# ------------------------------------------------------------------------------------------------------------ own streams


def own_streams(device: str) -> None:
    where = torch.device(device)
    draw = lambda rank, n=8: on_rank_stream(rank, where, lambda: torch.rand(n, device=where))  # noqa: E731
    torch.manual_seed(0)
    if where.type == "cuda":
        torch.cuda.manual_seed(0)
    generator = torch.cuda.default_generators[0] if where.type == "cuda" else torch.default_generator
    state = generator.get_state()
    first = [draw(0), draw(0), draw(0)]
    after = torch.rand(4, device=where)
    generator.set_state(state)
    second = [draw(1), draw(1, 3), draw(1, 100)]  # shards of other sizes: the shared stream goes on alike
    assert torch.equal(after, torch.rand(4, device=where))
    assert len({tuple(t[:3].tolist()) for t in (*first, *second)}) == 6
    generator.set_state(state)
    assert torch.equal(draw(0), first[0])  # replayed
    seed = generator.initial_seed()
    with pytest.raises(ZeroDivisionError):
        on_rank_stream(0, where, lambda: 1 / 0)
    assert generator.initial_seed() == seed
    generator.set_state(state)
    many = torch.stack([draw(rank, 1000) for rank in range(16) for _ in range(16)]).double()
    assert many.mean().item() == pytest.approx(0.5, abs=5e-3)
    off = torch.corrcoef(many).fill_diagonal_(0).abs().max().item()  # no two of them alike
    assert off < 0.2


def test_own_streams() -> None:
    own_streams("cpu")


@run_if(min_gpus=1)
def test_own_streams_on_a_gpu() -> None:
    run_ranks(own_streams, 1, "cuda:0", init=False)  # in a process of its own: ranks of other tests are forked from this one


# ------------------------------------------------------------------------------------------------------ saved and restored


def draws() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), float(numpy.random.rand())


def test_states_of_all_coordinates(tmp_path: Path) -> None:
    def body() -> list[tuple[float, float, float]]:
        mesh = make_mesh("cpu", 2, 2)
        for seed in (torch.manual_seed, random.seed, numpy.random.seed):
            seed(dist.get_rank())
        draws()
        state = rng_state(mesh)
        if dist.get_rank() == 0:
            torch.save(state, tmp_path / "state.pt")
        dist.barrier()
        expected = draws()
        set_shared_state(mesh, torch.load(tmp_path / "state.pt", weights_only=True))
        assert draws() == expected
        return [expected]

    ranks = run_ranks(body, 4)
    assert len({each for (each,) in ranks}) == 4


@pytest.mark.parametrize(
    ("shape", "shared"),
    [
        ((2, 2), {0: 0, 1: 1, 2: 2, 3: 3}),  # the same mesh: each rank its own
        ((1, 4), {0: 0, 3: 0}),  # one group: the shared stream of the first
        ((2, 1), {0: 0, 1: 2}),  # the first ranks of the groups that there were
        ((4, 1), {0: 0, 1: 2, 2: None, 3: None}),  # more groups than there were: streams of their own
    ],
)
def test_streams_on_another_mesh(shape: tuple[int, int], shared: dict[int, int | None]) -> None:
    states = [
        {"cpu": torch.Generator().manual_seed(rank).get_state(), "python": random.Random(rank).getstate()} for rank in range(4)
    ]
    saved = {"mesh": (2, 2), "ranks": states}
    expected = [(torch.rand(1, generator=torch.Generator().manual_seed(r)).item(), random.Random(r).random()) for r in range(4)]
    news = []
    for rank, of in shared.items():
        with fake_world(shape[0] * shape[1], rank=rank):
            set_shared_state(make_mesh("cpu", *shape), saved)
            got = torch.rand(1).item(), random.random()
        if of is None:
            news.append(got[0])
        else:
            assert got == expected[of], rank
    assert len({*news, *(e[0] for e in expected)}) == 4 + len(news)
