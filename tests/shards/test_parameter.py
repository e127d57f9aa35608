"""What user code sees of a sharded parameter is what one process shows: values, shapes, gradients, hooks, writes, files."""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import lightning_tp as ltp
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.shards.parameter import ShardedParameter
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks
from tests.harness import Collectives

PLAN = {"0": "colwise", "2": "rowwise", "**": "replicate"}
MESHES = {"tp2": (1, 2), "2x2": (2, 2), "tp4": (1, 4)}


def build() -> nn.Sequential:
    return randomize_(nn.Sequential(nn.Linear(8, 34), nn.GELU(), nn.Linear(34, 8), nn.LayerNorm(8)))


def batch() -> Tensor:
    return torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))


def on(mesh: tuple[int, int], body: Callable[[nn.Sequential, nn.Sequential], Any]) -> list[Any]:
    """Run `body(one process's model, the split one)` on each rank."""

    def run() -> Any:
        model = build()
        return body(build(), ltp.parallelize(model, make_mesh("cpu", *mesh), PLAN))

    return run_ranks(run, mesh[0] * mesh[1])


@pytest.mark.parametrize("mesh", MESHES)
def test_moving_a_model_sends_nothing(mesh: str) -> None:
    """Each rank moves its shards: asking whether the memory of a parameter can be exchanged is no reason to gather it."""

    def body(ref: nn.Sequential, model: nn.Sequential) -> None:
        before = {n: p.to_local().double() if not isinstance(p, DTensor) else None for n, p in model.named_parameters()}
        with Collectives() as collectives:
            model.to("cpu").double()
        assert collectives.sent == []
        for name, p in model.named_parameters():
            assert p.dtype == torch.float64 and p.shape == dict(ref.named_parameters())[name].shape
            assert before[name] is None or torch.equal(p.to_local(), before[name])

    on(MESHES[mesh], body)


@pytest.mark.parametrize("mesh", MESHES)
def test_penalties_on_weights_train_as_in_one_process(mesh: str) -> None:
    """Of weights that are split, of weights whose gradients are terms of a sum, and of those that are equal; over several steps."""

    def loss(model: nn.Sequential, step: int) -> Tensor:
        total = model(batch()).square().mean()
        for p in model.parameters():
            total = total + 0.1 * p.norm() + 0.03 * (p * (1 + step)).pow(2).sum() + 0.01 * p.abs().max() + p.roll(1, 0).mean()
        return total + 0.1 * torch.nn.utils.parameters_to_vector(model.parameters()).norm()

    def body(ref: nn.Sequential, model: nn.Sequential) -> None:
        optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05) for m in (ref, model)]
        for step in range(3):
            losses = [loss(m, step) for m in (ref, model)]
            torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
            for value, optimizer in zip(losses, optimizers, strict=True):
                optimizer.zero_grad()
                value.backward()
            assert_trees_close(ltp.full_gradients(model), {n: p.grad for n, p in ref.named_parameters()}, rtol=1e-4)
            for optimizer in optimizers:
                optimizer.step()
        assert_trees_close(ltp.full_state_dict(model), ref.state_dict(), rtol=1e-4)

    on(MESHES[mesh], body)


@pytest.mark.parametrize("mesh", ["tp2", "2x2"])
def test_shapes_values_and_gradients_are_seen_in_full(mesh: str) -> None:
    def body(ref: nn.Sequential, model: nn.Sequential) -> None:
        for m in (ref, model):
            m(batch()).square().mean().backward()
        for p, q in zip(ref.parameters(), model.parameters(), strict=True):
            assert (q.shape, q.numel(), q.ndim, len(q), q.stride(), q.size(0)) == (
                p.shape, p.numel(), p.ndim, len(p), p.stride(), p.size(0)
            )  # fmt: skip
            assert isinstance(q, nn.Parameter) and q.grad.shape == p.shape
            torch.testing.assert_close(q.grad.norm(), p.grad.norm())
            torch.testing.assert_close(q.data.sum(), p.data.sum())
            torch.testing.assert_close(torch.as_tensor(q.detach().numpy()), p.detach())
            torch.testing.assert_close(q[0] @ q[0] if q.ndim == 2 else q[0], p[0] @ p[0] if p.ndim == 2 else p[0])
            assert str(q.detach().cpu().tolist()) == str(p.detach().tolist())

    on(MESHES[mesh], body)


@pytest.mark.parametrize("mesh", ["tp2", "2x2"])
def test_writes_in_place_keep_each_ranks_shard(mesh: str) -> None:
    def change(model: nn.Module) -> None:
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.mul_(0.5)
                p.copy_(p + i)
                p.data /= p.data.norm()
                p[0] = 3.0
                p.data = p.data * torch.arange(p.numel()).view_as(p)
                p.grad = p.detach() * 2
                p.grad.clamp_(max=1)
            model[0].weight.data.view(-1)[::3] = 0
            model[2].weight.grad[1:3].T.mul_(7)
            for row in model[0].weight.data:
                row[2:4].add_(0.5)
            model[2].weight.data.T[4].clamp_(max=0.1)
            torch.manual_seed(3)
            nn.init.normal_(model[0].weight)
            model[2].reset_parameters()
            torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(model.parameters()) + 1, model.parameters())

    def body(ref: nn.Sequential, model: nn.Sequential) -> None:
        for m in (ref, model):
            change(m)
        assert_trees_close(ltp.full_state_dict(model), ref.state_dict(), rtol=1e-6)
        assert_trees_close(ltp.full_gradients(model), {n: p.grad for n, p in ref.named_parameters()}, rtol=1e-6)
        with pytest.raises(ltp.TPError, match=r"`0\.weight` has the shape \(34, 8\), but was to be given .*\(40, 8\)"):
            model[0].weight.data = torch.zeros(40, 8)

    on(MESHES[mesh], body)


@pytest.mark.parametrize("mesh", ["tp2", "2x2"])
def test_hooks_see_full_gradients(mesh: str) -> None:
    """Registered before the split or after it, and removed again; with gradients of an earlier batch beside."""

    def body() -> None:
        ref, model = build(), build()
        counts: list[tuple[int, ...]] = []
        mask = torch.arange(34 * 8).view(34, 8) % 3

        def register(m: nn.Sequential) -> Any:
            m[0].weight.register_hook(lambda g: g * mask)
            m[3].weight.register_hook(lambda g: g / (g.norm() + 1e-3))
            m[2].weight.register_post_accumulate_grad_hook(lambda p: counts.append(tuple(p.grad.shape)))
            return m[0].bias.register_hook(lambda g: g * 5)

        handles = [register(ref), register(model)]
        weight = model[0].weight
        ltp.parallelize(model, make_mesh("cpu", *MESHES[mesh]), PLAN)
        assert mesh == "2x2" or weight is model[0].weight
        for m in (ref, model):
            m[2].bias.register_hook(lambda g: g + 1)
        for step in range(2):
            for m, handle in zip((ref, model), handles, strict=True):
                m(batch() + step).square().mean().backward()
                handle.remove()
        assert_trees_close(ltp.full_gradients(model), {n: p.grad for n, p in ref.named_parameters()}, rtol=1e-4)
        assert counts == [(8, 34)] * 4

    run_ranks(body, 2 * MESHES[mesh][0])


def test_what_is_written_out_is_whole() -> None:
    def body(ref: nn.Sequential, model: nn.Sequential) -> None:
        state = model[0].state_dict()
        assert all(type(t) is Tensor for t in state.values())
        assert_trees_close(state, ref[0].state_dict(), rtol=0)
        file = io.BytesIO()
        torch.save({"p": model[0].weight, "state": model[2].state_dict()}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        torch.testing.assert_close(loaded["p"], ref[0].weight)
        assert_trees_close(loaded["state"], ref[2].state_dict(), rtol=0)
        model[2].load_state_dict({k: v + 1 for k, v in ref[2].state_dict().items()})
        torch.testing.assert_close(ltp.full_state_dict(model)["2.weight"], ref[2].weight.detach() + 1)
        twin = copy.deepcopy(model)
        assert twin[0].weight.shape == (34, 8) and type(twin[0].weight) is ShardedParameter

    on((1, 2), body)


def test_a_read_on_one_rank_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import timedelta

    from lightning_tp.shards import shard

    monkeypatch.setattr(shard, "WAIT", timedelta(seconds=2))

    def body(ref: nn.Sequential, model: nn.Sequential) -> None:
        if torch.distributed.get_rank():
            time.sleep(4)
            return
        with pytest.raises(ltp.TPError, match=r"Rank 0 reads `0\.weight` in full, which takes all ranks"):
            model[0].weight.norm()

    on((1, 2), body)


def test_a_mesh_of_one_rank_keeps_plain_parameters() -> None:
    def body() -> None:
        model = ltp.parallelize(build(), make_mesh("cpu", 1, 1), {"**": "replicate"})
        assert type(model[0].weight) is nn.Parameter and type(model.state_dict()["0.weight"]) is Tensor

    run_ranks(body, 1)
