"""Ranks that differ: other plans are refused, other weights become the first rank's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import lightning_tp as ltp
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp._compat import local_tensor
from lightning_tp.apply import same_everywhere
from lightning_tp.apply.same_everywhere import same_plan_everywhere, same_values_everywhere, same_weights_everywhere
from lightning_tp.core.comm.mesh import TENSOR_PARALLEL, make_mesh
from lightning_tp.plan.plan import Plan
from lightning_tp.testing import run_ranks
from tests.apply.test_parallelize import ODD, Case, loss_of


def replicated(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if p._tp_shard.split.dim is None]


def assert_equal_on(group: dist.ProcessGroup, tensors: list[tuple[str, Tensor]]) -> None:
    for name, t in tensors:
        every = [torch.empty_like(t) for _ in range(group.size())]
        dist.all_gather(every, t.contiguous(), group=group)
        assert all(torch.equal(other, t) for other in every), f"{name} differs"


@pytest.mark.parametrize("mesh", [(1, 4), (2, 2)], ids=["tp4", "2x2"])
def test_ranks_seeded_differently_become_and_stay_equal(mesh: tuple[int, int]) -> None:
    case = Case(*mesh, model=dict(num_kv_heads=1))

    def body() -> dict[str, Tensor]:
        device_mesh = make_mesh("cpu", *mesh)
        torch.manual_seed(dist.get_rank())
        model = Llama(LlamaConfig(**{**ODD, **case.model}))
        for p in model.parameters():
            p.data += torch.randn(p.shape) * 0.1
        model.rope += dist.get_rank()
        first = {n: t.clone() for n, t in model.state_dict().items()}
        ltp.parallelize(model, device_mesh, PLAN)
        group = device_mesh.get_group(TENSOR_PARALLEL)
        found = [(n, local_tensor(p.detach())) for n, p in replicated(model)]
        assert len(found) == 2 * 4 + 1  # wo, w2 and two norms in each of two blocks, and the last norm
        assert_equal_on(group, [*found, ("rope", model.rope)])
        start = ltp.full_state_dict(model)
        if dist.get_rank() == 0:
            assert all(torch.equal(start[n], t) for n, t in first.items())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(5):
            tokens = torch.randint(0, 1003, (2, 18), generator=torch.Generator().manual_seed(step))
            loss_of(model, tokens).backward()
            ltp.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        end = [(n, local_tensor(p.detach())) for n, p in replicated(model)]
        assert_equal_on(group, end)
        shared = [(n, p.detach()) for n, p in model.named_parameters() if ".wk." in n or ".wv." in n]
        assert_equal_on(group, [(n, local_tensor(p)) for n, p in shared])  # the one key/value head is on every rank
        return start

    results = run_ranks(body, 4)
    for other in results[1:]:
        assert all(torch.equal(other[n], t) for n, t in results[0].items())


@pytest.mark.parametrize("mesh", [(1, 2), (2, 2), (2, 1)], ids=["tp2", "2x2", "dp2"])
def test_different_models_on_the_ranks(mesh: tuple[int, int]) -> None:
    def body() -> str:
        device_mesh = make_mesh("cpu", *mesh)
        model = Llama(LlamaConfig(**{**ODD, "hidden_dim": 348 if dist.get_rank() == 1 else 344}))
        with pytest.raises(ltp.TPError) as info:
            ltp.parallelize(model, device_mesh, PLAN)
        assert model.output.weight.shape == (1003, 64)  # nothing is changed
        return str(info.value)

    messages = run_ranks(body, mesh[0] * mesh[1], timeout=30)
    assert len(set(messages)) == 1 and "2 different plans" in messages[0]


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model[2].weight = nn.Parameter(model[0].weight.detach().T.clone())
    model.register_buffer("mask", torch.rand(5) > 0.5)
    model.register_buffer("nothing", torch.empty(0))
    model.register_buffer("on_meta", torch.empty(3, device="meta"))
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip((*a.parameters(), *a.buffers()), (*b.parameters(), *b.buffers()), strict=True)
    return all(x.is_meta or torch.equal(x, y) for x, y in pairs)


def test_all_ranks_get_the_weights_of_the_first() -> None:
    def body() -> None:
        mesh, rank = make_mesh("cpu", 2, 2), dist.get_rank()
        same_everywhere.BUCKET = 5  # several pieces for each tensor
        for odd in (1, 2, 3):  # one rank differs: beside the first, in the other group, both
            model = model_of(odd if rank == odd else 0)
            parameters = list(model.parameters())
            same_weights_everywhere(model, mesh)
            assert same(model, model_of(0)) and all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
            assert all(p.requires_grad for p in model.parameters())
        model = model_of(rank)
        same_weights_everywhere(model, mesh)
        assert same(model, model_of(0))
        order = nn.Linear(2, 1, bias=False)
        order.weight.data = torch.tensor([[1.0, 2.0]] if rank != 2 else [[2.0, 1.0]])  # the same bytes, elsewhere
        same_weights_everywhere(order, mesh)
        assert order.weight.tolist() == [[1, 2]]
        values = list(same_values_everywhere(iter([(["a"], torch.full((3,), float(rank))), (["b"], torch.empty(0))]), mesh))
        assert values[0][0] == ["a"] and values[0][1].tolist() == [0, 0, 0] and values[1][1].numel() == 0

    run_ranks(body, 4)


def test_what_is_equal_already_is_not_sent() -> None:
    def body() -> None:
        mesh, sent = make_mesh("cpu", 2, 1), []
        broadcast = dist.broadcast
        same_everywhere.dist.broadcast = lambda t, **kwargs: sent.append(t.numel()) or broadcast(t, **kwargs)  # type: ignore[assignment]
        try:
            same_weights_everywhere(model_of(0), mesh)
            assert sent == []
            model = model_of(0)
            model[0].bias.data += dist.get_rank()
            same_weights_everywhere(model, mesh)
            assert sent == [16] and same(model, model_of(0))  # bytes of a bias
        finally:
            same_everywhere.dist.broadcast = broadcast

    run_ranks(body, 2)


def test_buffers_of_every_dtype_are_sent() -> None:
    def body() -> None:
        model, rank = nn.Module(), dist.get_rank()
        for dtype in (torch.int16, torch.uint16, torch.complex64, torch.bool, torch.float8_e4m3fn, torch.float64):
            model.register_buffer(f"b{str(dtype)[6:]}", torch.full((2, 3), rank).to(dtype))
            model.register_buffer(f"scalar_{str(dtype)[6:]}", torch.tensor(rank).to(dtype))
        same_weights_everywhere(model, make_mesh("cpu", 1, 2))
        assert all(not b.to(torch.complex64).any() for b in model.buffers())

    run_ranks(body, 2)


def test_plans_are_compared_over_the_whole_mesh() -> None:
    def body(odd: Any) -> str | None:
        mesh = make_mesh("cpu", 2, 2)
        styles = {"0": "colwise", "1": "rowwise" if dist.get_rank() == odd else "replicate"}
        plan = Plan.of(styles).check(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 2)
        try:
            same_plan_everywhere(plan, mesh)
        except ltp.TPError as error:
            return str(error)
        return None

    assert run_ranks(body, 4, None) == [None] * 4
    for message in run_ranks(body, 4, 3):
        assert message.startswith("The ranks have 2 different plans (") and "Build the same model" in message
