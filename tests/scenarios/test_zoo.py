"""Every model of `zoo.py` on two and on four real ranks, after the plan that is inferred for it, against one process."""

from __future__ import annotations

import functools
import traceback
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

import lightning_tp as ltp
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.testing import assert_trees_close, run_ranks
from tests.zoo import CASES, HELD

LR = 0.05
ON_FOUR = tuple(CASES)[::6]  # on four ranks as well by default: four processes take their time on few cores


def _steps(model: torch.nn.Module, inputs: dict[str, Any], loss_fn: Any, gradients: Any) -> dict[str, Any]:
    """The loss, all gradients, and the loss after a step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    loss = loss_fn(model(**inputs))
    loss.backward()
    grads = gradients(model)
    optimizer.step()
    optimizer.zero_grad()
    return {"losses": torch.stack((loss.detach(), loss_fn(model(**inputs)).detach())), "grads": grads}


def _whole_grads(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}


def _on_ranks(plans: dict[str, Any], references: dict[str, Any]) -> dict[str, Any]:
    mesh = make_mesh("cpu", 1, dist.get_world_size())
    found: dict[str, Any] = {}
    for name, plan in plans.items():
        model, inputs, loss_fn = CASES[name]()
        total = sum(p.numel() for p in model.parameters())
        try:
            with sdpa_kernel(SDPBackend.MATH):
                ltp.parallelize(model, mesh, plan)
                held = sum(p.to_local().numel() for p in model.parameters()) / total  # type: ignore[operator]
                got = _steps(model, inputs, loss_fn, ltp.full_gradients)
            state = ltp.full_state_dict(model)
            if dist.get_rank() == 0:
                ref = references[name]
                assert_trees_close({"losses": got["losses"]}, {"losses": ref["losses"]}, rtol=1e-4)
                assert_trees_close(got["grads"], ref["grads"], rtol=2e-3, floor=1e-3, name="gradients")
                assert_trees_close(state, ref["state"], rtol=1e-3, name="weights after a step")
            found[name] = held
        except Exception:
            found[name] = traceback.format_exc(limit=-4)
    return found


@functools.cache
def _reference(names: tuple[str, ...]) -> dict[str, Any]:
    references = {}
    for name in names:
        model, inputs, loss_fn = CASES[name]()
        with sdpa_kernel(SDPBackend.MATH):
            references[name] = _steps(model, inputs, loss_fn, _whole_grads)
        references[name]["state"] = {k: v.clone() for k, v in model.state_dict().items()}
    return references


@functools.cache
def _results(tp: int, names: tuple[str, ...]) -> dict[str, Any]:
    plans: dict[str, Any] = {}
    failed: dict[str, Any] = {}
    for name in names:
        model, inputs, _ = CASES[name]()
        try:
            plans[name] = ltp.infer_plan(model, inputs, tp=tp)
            plans[name].check(model, tp)
        except Exception:
            failed[name] = traceback.format_exc(limit=-4)
            plans.pop(name, None)
    return {**failed, **run_ranks(_on_ranks, tp, plans, _reference(names))[0]}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process_on_two_ranks(name: str) -> None:
    result = _results(2, tuple(CASES))[name]
    assert isinstance(result, float), result
    assert result <= HELD[name]


@pytest.mark.parametrize("name", [name if name in ON_FOUR else pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_equals_one_process_on_four_ranks(name: str) -> None:
    names = ON_FOUR if name in ON_FOUR else tuple(n for n in CASES if n not in ON_FOUR)
    result = _results(4, names)[name]
    assert isinstance(result, float), result
