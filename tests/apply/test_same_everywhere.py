"""Ranks with other weights get those of the first; ranks with another plan are refused."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import lightning_tp as ltp
from lightning_tp.apply import same_everywhere
from lightning_tp.apply.same_everywhere import same_plan_everywhere, same_values_everywhere, same_weights_everywhere
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.plan.plan import Plan
from lightning_tp.testing import run_ranks


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
            assert sent == [4] and same(model, model_of(0))
        finally:
            same_everywhere.dist.broadcast = broadcast

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
