"""Plain parameters and DTensors together in torch's optimizers, and clipped together: as in one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import lightning_tp as ltp
from lightning_tp.core.comm.fake_world import fake_world
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.shards.kinds import _by_kind, kind_of
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks

PLAN = {"0": "colwise", "2": "rowwise", "**": "replicate"}
MESHES = {"tp2": (1, 2), "2x2": (2, 2)}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, lr=0.05),
    "adamw foreach": partial(torch.optim.AdamW, lr=0.05, foreach=True, amsgrad=True),
    "adamw fused": partial(torch.optim.AdamW, lr=0.05, fused=True),
    "sgd foreach": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "rmsprop foreach": partial(torch.optim.RMSprop, lr=0.01, foreach=True, centered=True),
}
CLIPS: dict[str, Callable[[Any], Any]] = {
    "norm": lambda p: torch.nn.utils.clip_grad_norm_(p, 0.1),
    "norm foreach": lambda p: torch.nn.utils.clip_grad_norm_(p, 0.1, foreach=True),
    "largest": lambda p: torch.nn.utils.clip_grad_norm_(p, 0.01, norm_type=float("inf")),
    "value": lambda p: torch.nn.utils.clip_grad_value_(p, 0.01),
    "value foreach": lambda p: torch.nn.utils.clip_grad_value_(p, 0.01, foreach=True),
}


def build() -> nn.Sequential:
    return randomize_(
        nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 4).requires_grad_(False))
    )


@pytest.mark.parametrize("mesh", MESHES)
def test_steps_are_those_of_one_process(mesh: str) -> None:
    def body() -> None:
        for name, make in OPTIMIZERS.items():
            for how, clip in CLIPS.items():
                ref, model = build(), ltp.parallelize(build(), make_mesh("cpu", *MESHES[mesh]), PLAN, backend="dtensor")
                assert len({kind_of(p) for p in model.parameters()}) == 2
                optimizers, norms = [make(m.parameters()) for m in (ref, model)], []
                for _ in range(2):
                    for m, optimizer in zip((ref, model), optimizers, strict=True):
                        optimizer.zero_grad()
                        m(torch.ones(2, 4, 8).cumsum(1)).square().mean().backward()
                        norms.append(clip(m.parameters()))
                        optimizer.step()
                assert_trees_close(ltp.full_state_dict(model), ref.state_dict(), rtol=1e-4)
                for one, many in zip(norms[::2], norms[1::2], strict=True):
                    assert one is None or (not isinstance(many, DTensor) and float(many) == pytest.approx(float(one), rel=1e-4)), (
                        name,
                        how,
                    )

    run_ranks(body, MESHES[mesh][0] * MESHES[mesh][1])


@pytest.mark.parametrize("mesh", MESHES)
def test_norms_that_are_logged_are_those_of_one_process(mesh: str) -> None:
    def body(order: float) -> None:
        ref, model = build(), ltp.parallelize(build(), make_mesh("cpu", *MESHES[mesh]), PLAN, backend="dtensor")
        for m in (ref, model):
            m(torch.ones(2, 4, 8).cumsum(1)).square().mean().backward()
        assert_trees_close(ltp.grad_norms(model, order), ltp.grad_norms(ref, order), rtol=1e-4)
        total = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None], order)
        assert float(total) == pytest.approx(float(ltp.grad_norms(ref, order)[f"grad_{order}_norm_total"]), rel=1e-4)

    for order in (2.0, float("inf")):
        run_ranks(body, MESHES[mesh][0] * MESHES[mesh][1], order)


def test_groups_keep_their_places() -> None:
    with fake_world(2):
        mesh = make_mesh("cpu", 1, 2)["tensor_parallel"]
        split = [DTensor.from_local(torch.ones(2), mesh, run_check=False) for _ in range(2)]
        plain = [torch.ones(1), torch.ones(1, dtype=torch.float64), torch.ones(3)]
        mixed: list[Tensor] = [plain[0], split[0], plain[1], split[1], plain[2]]
        group = _by_kind(torch.utils._foreach_utils._group_tensors_by_device_and_dtype)  # type: ignore[arg-type]
        found = group([mixed, [], [None] * 5], True)
        by_dtype = [
            (dtype, [t.shape for t in lists[0]], lists[1], lists[2], indices) for (_, dtype), (lists, indices) in found.items()
        ]
        assert sorted((str(d), i, none, nothing) for d, _, none, nothing, i in by_dtype) == [
            ("torch.float32", [0, 4], [], [None, None]),
            ("torch.float32", [1, 3], [], [None, None]),
            ("torch.float64", [2], [], [None]),
        ]
        assert len(group([plain], False)) == 2
