"""Optimizer states by name: there and back, and on other meshes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import lightning_tp as ltp
from lightning_tp.shards import optimizer_state
from lightning_tp.testing import assert_trees_close
from tests.shards.test_state_dict import assert_equal, backward, build, each_mesh, on, split


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, mesh: Any = None) -> None:
    for step in steps:
        backward(model, mesh, step)
        optimizer.step()
        optimizer.zero_grad()


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    named = dict(model.named_parameters())
    vectors = [p for n, p in named.items() if len(p.shape) == 1 and p.requires_grad]
    matrices = [p for p in named.values() if len(p.shape) > 1]
    return torch.optim.AdamW([{"params": matrices, "lr": 1e-2}, {"params": vectors, "weight_decay": 0.0}], lr=1e-3, eps=1e-3)


@each_mesh
def test_optimizer_state_there_and_back(mesh: tuple[int, int]) -> None:
    """A run that is taken up by another optimizer goes on bitwise the same; by one on another mesh, closely."""
    whole = build()
    optimizer = two_groups(whole)
    train(whole, optimizer, range(2))
    names = {id(p): n for n, p in whole.named_parameters()}
    halfway = {f"{names[id(p)]}.{k}": v.clone() for p, of in optimizer.state.items() for k, v in of.items()}
    weights = {n: t.clone() for n, t in whole.state_dict().items()}
    train(whole, optimizer, range(2, 4))
    ref = dict(whole.state_dict())

    def body(device_mesh: Any) -> None:
        model = split(device_mesh)
        optimizer = two_groups(model)
        train(model, optimizer, range(2), device_mesh)
        there, full = optimizer_state.optimizer_state(optimizer), optimizer_state.full_optimizer_state(optimizer)
        flat = {f"{n}.{k}": v for n, of in full["state"].items() for k, v in of.items()}
        assert_trees_close(flat, halfway, rtol=1e-4, name="optimizer state")
        assert all(isinstance(there["state"][n]["exp_avg"], DTensor) for n in full["state"])
        assert [g["lr"] for g in there["param_groups"]] == [1e-2, 1e-3]
        assert there["param_groups"][1]["params"][0] == "blocks.0.norm.weight"
        at_two = ltp.full_state_dict(model)
        there["state"] = {
            n: {k: v.clone() for k, v in of.items()} for n, of in there["state"].items()
        }  # its memory is the optimizer's
        train(model, optimizer, range(2, 4), device_mesh)
        end = ltp.full_state_dict(model)

        for state in (there, full):  # its own, and whole tensors
            again = split(device_mesh, seed=2)
            again.load_state_dict(at_two)
            other = two_groups(again)
            other.param_groups[0]["lr"] = 1.0
            optimizer_state.load_optimizer_state(other, state)
            assert [g["lr"] for g in other.param_groups] == [1e-2, 1e-3]
            train(again, other, range(2, 4), device_mesh)
            assert_equal(ltp.full_state_dict(again), end)

        # what one process would have, onto this mesh
        again = split(device_mesh, seed=2)
        again.load_state_dict(weights)
        other = two_groups(again)
        single = {n: {k: halfway[f"{n}.{k}"] for k in of} for n, of in full["state"].items()}
        optimizer_state.load_optimizer_state(other, {"state": single, "param_groups": full["param_groups"]})
        train(again, other, range(2, 4), device_mesh)
        assert_trees_close(ltp.full_state_dict(again), ref, rtol=1e-4)

    on(mesh, body)
