"""The norm of gradients and clipping by it, as in one process."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_ as imported_before

import lightning_tp as ltp
from examples.llama import PLAN
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.shards import grad_norm
from lightning_tp.shards.view import local_view
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks
from tests.harness import Sent
from tests.shards.test_gradients import backward, batch, each_mesh, fused, fused_plan, llama

Build = Callable[[], nn.Module]


CLIPPED: dict[tuple[int, int], dict[str, tuple[Build, Any]]] = {
    (1, 2): {
        "llama, tied": (lambda: llama(4, tied=True), PLAN),
        "fused, 1 kv head": (fused, fused_plan(1, 2)),
    },
    (1, 4): {
        "llama, 3 words": (lambda: llama(vocab_size=3), PLAN),
        "fused, 1 kv head": (fused, fused_plan(1, 4)),
        "fused, 2 kv heads": (lambda: fused(2), fused_plan(2, 4)),
    },
    (2, 2): {
        "llama, tied": (lambda: llama(4, tied=True), PLAN),
        "llama, 3 words": (lambda: llama(vocab_size=3), PLAN),
        "fused, 1 kv head": (fused, fused_plan(1, 2)),
    },
}


ORDERS = (2.0, 1.0, float("inf"), 3.0)


MOST = 1e-3  # so little that there is always something to clip


def clipped(model: nn.Module, clip: Callable[..., Tensor], order: float, tokens: Tensor, mesh: Any = None) -> tuple[float, Any]:
    model.zero_grad()
    backward(model, tokens, mesh)
    norm = clip(model.parameters(), MOST, norm_type=order)
    return norm.item(), {n: g.clone() for n, g in ltp.full_gradients(model).items()}


def some(model: nn.Module) -> list[nn.Parameter]:
    return list(model.parameters())[::3]


def clipped_in_one_process(build: Build, tokens: Tensor) -> Clipped:
    found = {order: clipped(build(), torch.nn.utils.clip_grad_norm_, order, tokens) for order in ORDERS}
    assert all(norm > 2 * MOST for norm, _ in found.values())
    whole = build()
    backward(whole, tokens)
    of_some = torch.nn.utils.clip_grad_norm_(some(whole), 1e9).item()
    return Clipped(tokens, {o: norm for o, (norm, _) in found.items()}, {o: g for o, (_, g) in found.items()}, of_some)


@dataclass
class Clipped:
    """What a model has, clipped by each norm: the norms before, and the gradients after; and the norm of every third gradient."""

    tokens: Tensor
    norms: dict[float, float]
    gradients: dict[float, dict[str, Tensor]]
    of_some: float


@each_mesh
def test_norm_and_clipping_as_in_one_process(mesh: tuple[int, int]) -> None:
    cases = CLIPPED[mesh]
    refs = {name: clipped_in_one_process(build, batch() % 3 if "words" in name else batch()) for name, (build, _) in cases.items()}

    def body() -> None:
        device_mesh = make_mesh("cpu", *mesh)
        for name, (build, plan) in cases.items():
            model, ref = ltp.parallelize(build(), device_mesh, plan), refs[name]
            from torch.nn.utils import clip_grad_norm_ as imported_after

            for who, clip, orders in (
                ("ours", ltp.clip_grad_norm_, ORDERS),
                ("before", imported_before, (2.0, float("inf"))),
                ("after", imported_after, (1.0,)),
            ):
                for order in orders:
                    norm, gradients = clipped(model, clip, order, ref.tokens, device_mesh)
                    assert norm == pytest.approx(ref.norms[order], rel=1e-9), f"{name}, {who}, order {order}"
                    assert_trees_close(gradients, ref.gradients[order], rtol=1e-9, name=f"{name}, {who}, order {order}")
            model.zero_grad()
            backward(model, ref.tokens, device_mesh)
            got = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            assert got.item() == pytest.approx(ref.norms[2.0], rel=1e-9), name
            assert ltp.clip_grad_norm_(some(model), 1e9).item() == pytest.approx(ref.of_some, rel=1e-9), name

    run_ranks(body, mesh[0] * mesh[1])


@each_mesh
def test_clipping_by_value(mesh: tuple[int, int]) -> None:
    whole = fused()
    backward(whole, batch())
    torch.nn.utils.clip_grad_value_(whole.parameters(), 1e-3)
    ref = ltp.full_gradients(whole)
    assert all(g.abs().max() <= 1e-3 for g in ref.values())

    def body() -> None:
        device_mesh = make_mesh("cpu", *mesh)
        model = ltp.parallelize(fused(), device_mesh, fused_plan(1, mesh[1]))
        backward(model, batch(), device_mesh)
        torch.nn.utils.clip_grad_value_(model.parameters(), 1e-3)
        assert_trees_close(ltp.full_gradients(model), ref, rtol=1e-9)

    run_ranks(body, mesh[0] * mesh[1])


@pytest.mark.parametrize("mesh", [(1, 2), (2, 2), (2, 1)], ids=["tp2", "2x2", "dp2"])
def test_one_all_reduce_an_axis(mesh: tuple[int, int]) -> None:
    def body() -> None:
        device_mesh = make_mesh("cpu", *mesh)
        model = ltp.parallelize(llama(), device_mesh, PLAN)
        backward(model, batch(), device_mesh)
        for clip in (ltp.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
            for order in (2.0, float("inf")):
                with Sent() as sent:
                    clip(model.parameters(), 1.0, norm_type=order)
                assert sent.all == ["allreduce"] * sum(n > 1 for n in mesh), (clip, order)

    run_ranks(body, mesh[0] * mesh[1])


def test_norm_of_half_precision_is_taken_in_float32() -> None:
    """bfloat16 has 3 digits, also in torch's own norm of each gradient; the norm of all should have more."""

    def body() -> None:
        model = ltp.parallelize(llama(dtype=torch.bfloat16), make_mesh("cpu", 1, 2), PLAN)
        backward(model, batch())
        exact = torch.cat([g.double().flatten() for g in ltp.full_gradients(model).values()]).norm().item()
        assert ltp.clip_grad_norm_(model.parameters(), 1e9).item() == pytest.approx(exact, rel=1e-5)

    run_ranks(body, 2)


def test_a_norm_that_is_not_finite() -> None:
    def body() -> None:
        model = ltp.parallelize(llama(), make_mesh("cpu", 1, 2), PLAN)
        backward(model, batch())
        if dist.get_rank() == 1:  # on one rank only; all have to know
            with local_view():
                model.output.weight.grad[0, 0] = float("nan")
        with pytest.raises(RuntimeError, match=r"order 2\.0 is nan"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        assert ltp.clip_grad_norm_(model.parameters(), 1.0).isnan()

    run_ranks(body, 2)


def test_nothing_to_clip() -> None:
    def body() -> None:
        model = ltp.parallelize(llama(), make_mesh("cpu", 1, 2), PLAN)
        for clip in (ltp.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
            assert clip(model.parameters(), 1.0) == 0
        backward(model, batch())
        before = ltp.full_gradients(model)
        norm = ltp.clip_grad_norm_(model.output.weight, 1e9)  # a tensor alone, as torch's takes it
        assert norm == torch.nn.utils.clip_grad_norm_(model.output.weight, 1e9) > 0
        assert_trees_close(ltp.full_gradients(model), before, rtol=0.0)

    run_ranks(body, 2)


def test_other_models_are_clipped_as_ever() -> None:
    def gradients() -> nn.Linear:
        layer = randomize_(nn.Linear(8, 8))
        layer(torch.ones(2, 8)).sum().backward()
        return layer

    ref = torch.nn.utils.clip_grad_norm_(gradients().parameters(), 0.1).item()

    def body() -> None:
        before = len(grad_norm._applied)  # models of tests before this one, that the forked process has inherited
        model = ltp.parallelize(llama(), make_mesh("cpu", 1, 2), PLAN)
        backward(model, batch())
        layer = gradients()
        with Sent() as sent:
            assert imported_before(layer.parameters(), 0.1).item() == ref
        assert not sent.all
        assert torch.nn.utils.get_total_norm([torch.ones(4)]).item() == 2
        mine = len(list(model.parameters()))
        with pytest.raises(ltp.TPError, match=rf"asked of {mine + 2} gradients together, of which {mine} belong"):
            torch.nn.utils.clip_grad_norm_([*model.parameters(), *gradients().parameters()], 1.0)
        assert len(grad_norm._applied) == before + 1
        del model
        gc.collect()
        assert len(grad_norm._applied) <= before  # a model that is gone is not asked any more

    run_ranks(body, 2)
