"""Whose masks are equal over the ranks, whose differ, and what is replayed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_tp as ltp
from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.core.ops.intercept import is_intercepting, per_rank_calls_of
from lightning_tp.core.ops.random_numbers import bind_random_calls, policy_of
from lightning_tp.core.ops.rng import seed_mesh
from lightning_tp.shards.view import local_view
from lightning_tp.testing import fake_world, randomize_, run_ranks
from tests.core.ops.dropout_models import DIM, HEADS, Attention, Block, Net, batch, plan, steps


def test_nothing_is_there_to_be_exact_about_in_evaluation() -> None:
    def body() -> None:
        model = ltp.parallelize(randomize_(Net()), make_mesh("cpu", 1, 2), plan(True)).eval()
        state = torch.get_rng_state()
        model(batch(0))
        assert torch.equal(state, torch.get_rng_state())

    run_ranks(body, 2)


def alike(model: nn.Module) -> nn.Module:
    """Every head and every half of the MLP has nearly the same weights: what differs much over the ranks is dropped differently."""
    with torch.no_grad():
        for block in model.blocks:
            for layer in (block.attention.q, block.attention.k, block.attention.v, block.up):
                for p in layer.parameters():
                    half = p[: len(p) // 2] if layer is block.up else p[: DIM // HEADS]
                    p.copy_(half.repeat(len(p) // len(half), *(1 for _ in p.shape[1:])))
                    p.mul_(1 + 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    return model


def far(x: Tensor, y: Tensor) -> bool:
    return bool((x - y).norm() > 0.3 * x.norm())


@local_view()  # hooks that are registered outside of it see full activations
def seen(model: nn.Module) -> dict[str, Tensor]:
    """What goes into, or comes out of, some modules, in the next forward."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith((".o", ".inner", ".path", "drop", "out_dropout")):
            module.register_forward_hook(
                lambda m, args, out, name=name: found.__setitem__(name, (args[0] if name.endswith(".o") else out).detach().clone())
            )
    return found


@pytest.mark.parametrize("how", ["sdpa", "module", "function"])
@pytest.mark.parametrize("sequence", [False, True], ids=["whole stream", "sequence parallel"])
def test_whose_masks_are_equal(how: str, sequence: bool) -> None:
    """Over 2 x 2 ranks: those of whole activations inside a tensor-parallel group; no others."""

    def body() -> list[dict[str, Tensor]]:
        mesh = make_mesh("cpu", 2, 2)
        model = ltp.parallelize(alike(randomize_(Net(how))), mesh, plan(sequence))
        torch.manual_seed(3)
        seed_mesh(mesh)
        found, each = seen(model), []
        for step in range(5):  # the fourth is one that nobody observes
            model(batch(0))
            if step in (0, 3, 4):
                each.append(dict(found))
        return each

    ranks = run_ranks(body, 4)
    for a, b, c, d in zip(*ranks):
        for name in a:
            assert far(a[name], c[name]) and far(b[name], d[name]), name  # over dp
            x, y = a[name], b[name]
            if name.endswith((".o", ".inner")):
                assert far(x, y), name
            elif not sequence:
                assert torch.equal(x, y), name
            elif name.endswith("path"):  # a sample is dropped as a whole, on all ranks
                assert torch.equal((x == 0).all(2).all(1), (y == 0).all(2).all(1)), name
            else:
                assert not torch.equal(x == 0, y == 0), name
    assert any((r["blocks.0.path"] == 0).all(2).all(1).any() for of in ranks for r in of)
    for rank in ranks:  # and never the same twice
        assert not torch.equal(rank[1]["blocks.0.inner"] == 0, rank[2]["blocks.0.inner"] == 0)


@pytest.mark.parametrize("mesh", [pytest.param((1, 2), id="tp2"), pytest.param((2, 2), id="2x2", marks=pytest.mark.slow)])
def test_a_block_that_is_run_again_drops_the_same(mesh: tuple[int, int]) -> None:
    """Bitwise the same steps with activation checkpointing, ours or one around the modules; replicas stay equal."""
    from torch.utils.checkpoint import checkpoint

    class Around(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for block in self:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    def body() -> None:
        device_mesh = make_mesh("cpu", *mesh)
        for how in ("sdpa", "module", "function"):
            ends = []
            for checkpointing in (None, "block", "around"):
                model = randomize_(Net(how))
                if checkpointing == "around":
                    model.blocks = Around(*model.blocks)
                ltp.parallelize(
                    model, device_mesh, plan(True), activation_checkpointing="block" if checkpointing == "block" else None
                )
                torch.manual_seed(3)
                seed_mesh(device_mesh)
                losses = steps(model, (0, 1, 2, 3, 4))
                ends.append((losses, ltp.full_state_dict(model)))
            for losses, weights in ends[1:]:
                assert losses == ends[0][0]
                assert all(torch.equal(t, ends[0][1][n]) for n, t in weights.items())
            every: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(every, ends[0])
            for _, weights in every:
                assert all(torch.equal(t, weights[n]) for n, t in ends[0][1].items())

    run_ranks(body, mesh[0] * mesh[1])


def test_half_of_a_shard_is_kept_and_scaled() -> None:
    """The law of the masks, on a rank's own stream."""

    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 4000), nn.Linear(4000, 8)

        def forward(self, x: Tensor) -> Tensor:
            self.kept = F.dropout(self.up(x), 0.25, self.training)
            return self.down(self.kept)

    def body() -> tuple[Tensor, Tensor]:
        model = randomize_(MLP())
        ltp.parallelize(model, make_mesh("cpu", 1, 2), {"up": "colwise", "down": "rowwise"})
        x = torch.ones(5, 8)
        model(x)
        model(x)
        return model.kept, model.up(x)

    ranks = run_ranks(body, 2)
    for kept, whole in ranks:
        on = kept != 0
        assert on.float().mean().item() == pytest.approx(0.75, abs=0.02)
        torch.testing.assert_close(kept[on], whole[on] / 0.75)
    agree = ((ranks[0][0] == 0) == (ranks[1][0] == 0)).float().mean().item()
    assert agree == pytest.approx(0.75**2 + 0.25**2, abs=0.02)  # by chance


def test_a_model_without_dropout_is_left_alone() -> None:
    def body() -> None:
        model = randomize_(Net())
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, Attention):
                module.how = "module"
        model.blocks = nn.Sequential(*(Plain(block) for block in model.blocks))
        names = {n.replace("blocks.*", "blocks.*.block"): s for n, s in plan(False).items()}
        ltp.parallelize(model, make_mesh("cpu", 1, 2), names)
        steps(model)
        assert not any("_per_rank_calls" in m.__dict__ for m in model.modules())

    class Plain(nn.Module):
        def __init__(self, block: Block) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.block.attention(self.block.norm1(x))
            return x + self.block.down(self.block.inner(F.gelu(self.block.up(self.block.norm2(x)))))

    run_ranks(body, 2)


def test_options() -> None:
    def body() -> None:
        for options in ({"dropout": "exactly"}, {"dropout": "exact", "backend": "dtensor"}):
            with pytest.raises(ltp.TPError, match="there is 'independent', and 'exact'"):
                ltp.parallelize(Net(), make_mesh("cpu", 1, 2), plan(False), **options)

    run_ranks(body, 2)


# ------------------------------------------------------------------------------------------------- seeds and indices


class Seeded(nn.Module):
    """Seeds by itself in its forward, drops a whole activation, looks at some tokens only."""

    def __init__(self, seed: Callable[[], Any] | None, *, sampled: bool = False) -> None:
        super().__init__()
        self.seed, self.sampled = seed, sampled
        self.up, self.down = nn.Linear(DIM, 48), nn.Linear(48, DIM)

    def forward(self, x: Tensor) -> Tensor:
        if self.seed is not None:
            self.seed()
        y = self.up(x).relu()
        if self.sampled:
            y = y.index_select(1, torch.randint(0, y.shape[1], (4,))) + y.mean(1, keepdim=True)
        y = self.down(y)
        return y if self.sampled else F.dropout(y, 0.5, self.training)


def seeded_steps(model: nn.Module) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for seed in range(5):  # the fourth is one that nobody observes
        x = torch.randn(2, 9, DIM, generator=torch.Generator().manual_seed(seed))
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


SEEDED_PLAN = {"up": "colwise", "down": "rowwise"}


def test_a_model_that_seeds_anew_draws_the_same_on_all_ranks() -> None:
    before = torch.seed

    def body() -> None:
        model = ltp.parallelize(randomize_(Seeded(lambda: torch.seed())), make_mesh("cpu", 1, 2), SEEDED_PLAN)
        losses = torch.tensor(seeded_steps(model))
        other = losses.clone()
        dist.broadcast(other, 0)
        assert torch.equal(losses, other)
        assert torch.seed is before

    run_ranks(body, 2)


def test_ranks_that_seed_themselves_otherwise_are_refused() -> None:
    def body() -> None:
        model = ltp.parallelize(randomize_(Seeded(lambda: torch.manual_seed(dist.get_rank()))), make_mesh("cpu", 1, 2), SEEDED_PLAN)
        with pytest.raises(ltp.TPError, match="generator for cpu is not in the same state on all tp=2 ranks"):
            model(torch.randn(2, 9, DIM, generator=torch.Generator().manual_seed(0)))

    run_ranks(body, 2)


def test_places_that_are_drawn_are_those_of_one_process() -> None:
    whole = randomize_(Seeded(None, sampled=True))
    torch.manual_seed(3)
    ref = seeded_steps(whole)

    def body() -> None:
        model = ltp.parallelize(randomize_(Seeded(None, sampled=True)), make_mesh("cpu", 1, 2), SEEDED_PLAN)
        torch.manual_seed(3)
        assert seeded_steps(model) == pytest.approx(ref, rel=1e-5)

    run_ranks(body, 2)


# ------------------------------------------------------------------------------------------------------- who decides what


class Noisy(nn.Module):
    """Random numbers of one kind between two split layers, in the code of the module that this is in."""

    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.noise = nn.Linear(DIM, 48), nn.Linear(48, DIM), noise

    def forward(self, x: Tensor) -> Tensor:
        self.shard = self.noise(self.up(x)).detach()
        return self.down(self.shard)


KINDS: dict[str, tuple[Callable[[Tensor], Tensor], bool, bool]] = {  # and whether ranks differ in the first step, and in later ones
    "dropout": (lambda x: F.dropout(x, 0.5), True, True),
    "in place": (lambda x: F.dropout(x.clone(), 0.5, True, True), True, True),
    "alpha_dropout": (lambda x: F.alpha_dropout(x, 0.5, True), True, True),
    "by another name": (lambda x: torch.dropout(x, 0.5, True), True, True),
    "rand": (lambda x: x * (torch.rand(x.shape) > 0.5), False, True),  # decided when it meets the shard: it has drawn then
    "bernoulli": (lambda x: x * torch.bernoulli(torch.full(x.shape, 0.5)), False, True),
    "through functions": (lambda x: torch.where(torch.rand(x.shape).sub(0.5).gt(0), x, 0), False, True),
    "one for each sample": (lambda x: x * torch.rand(x.shape[0], 1, 1), False, False),
    "its own generator": (lambda x: x * torch.rand(x.shape, generator=torch.Generator().manual_seed(4)), False, False),
    "not in training": (lambda x: F.dropout(x, 0.5, False), False, False),
}


def test_which_calls_draw_for_shards() -> None:
    """Both ranks have the same weights in their shards: what differs between them are the random numbers."""

    def body() -> dict[str, list[Tensor]]:
        found = {}
        for name, (noise, *_) in KINDS.items():
            model = Noisy(noise)
            with torch.no_grad():
                model.up.weight[24:] = model.up.weight[:24] * (1 + 1e-2)
                model.up.bias.zero_()
            ltp.parallelize(model, make_mesh("cpu", 1, 2), SEEDED_PLAN)
            torch.manual_seed(3)
            x, shards = torch.ones(2, 9, DIM), []
            for _ in range(4):  # the fourth is one that nobody observes
                model(x)
                shards.append(model.shard / (model.up(x).detach() + 1e-12))
            found[name] = shards
            assert bool(per_rank_calls_of(model)) is KINDS[name][2], name
            policy = policy_of(model)
            assert policy is not None and not policy.noise and not policy.running and policy.steps == 4
        return found

    a, b = run_ranks(body, 2)
    for name, (_, first, later) in KINDS.items():
        differ = [not torch.allclose(x, y, atol=1e-3) for x, y in zip(a[name], b[name])]
        assert differ == [first, later, later, later], name


def test_steps_that_are_observed() -> None:
    seen: list[bool] = []

    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(is_intercepting())
            return x

    with fake_world(2):
        axis = Axis(dist.group.WORLD)
        for how in ("independent", "exact"):
            seen.clear()
            model = Asks()
            bind_random_calls(model, axis, how)  # type: ignore[arg-type]
            for _ in range(10):
                model(torch.ones(1))
            assert [i for i, observed in enumerate(seen) if observed] == (
                [0, 1, 2, 4, 8] if how == "independent" else list(range(10))
            )
            model.eval()(torch.ones(1))
            assert not seen[-1] and policy_of(nn.Sequential(model)).steps == 10
        policy = policy_of(model.train())
        with policy.step():
            model(torch.ones(1))  # a step inside of a step
        assert policy.steps == 12 and not is_intercepting()
        lightning_module = Asks()
        lightning_module.training_step = lambda: None
        bind_random_calls(lightning_module, axis, "independent")
        lightning_module(torch.ones(1))
        assert not seen[-1] and policy_of(lightning_module).steps == 0  # the strategy begins its steps
    assert policy_of(nn.Identity()) is None


def test_a_function_that_is_checkpointed_is_refused() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(DIM, 48), nn.Linear(48, DIM)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

        def inner(self, x: Tensor) -> Tensor:
            return self.down(F.dropout(self.up(x), 0.5, self.training))

    def body() -> None:
        model = ltp.parallelize(randomize_(Outer()), make_mesh("cpu", 1, 2), SEEDED_PLAN)
        with pytest.raises(
            ltp.TPError, match=r"Outer: `dropout` draws random numbers for a shard .* passed to `torch.utils.checkpoint`"
        ):
            model(torch.randn(2, 9, DIM, generator=torch.Generator().manual_seed(0)))
        assert not is_intercepting()

    run_ranks(body, 2)


@pytest.mark.parametrize("how", ["independent", "exact"])
def test_a_copy_draws_by_itself(how: str) -> None:
    def body() -> None:
        model = ltp.parallelize(randomize_(Net()), make_mesh("cpu", 1, 2), plan(True), dropout=how)
        torch.manual_seed(3)
        first = steps(model, (0, 1, 2, 3))
        fresh = ltp.parallelize(randomize_(Net()), make_mesh("cpu", 1, 2), plan(True), dropout=how)
        torch.manual_seed(3)
        steps(fresh, (0, 1))
        twin = copy.deepcopy(fresh)
        policies = policy_of(fresh), policy_of(twin)
        assert policies[1] is not policies[0] and policies[1].steps == 0 and policies[1].exact == (how == "exact")
        held = twin.blocks[0].inner.__dict__["_per_rank_calls"].interceptor
        assert held is policies[1]
        state = torch.get_rng_state()
        assert steps(twin, (2, 3)) == first[2:]
        torch.set_rng_state(state)
        assert steps(fresh, (2, 3)) == first[2:]

    run_ranks(body, 2)
