"""A steady step: the host waits for the GPU nowhere, and sends as many collectives as the step before."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_tp as ltp
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.testing import run_ranks
from tests.cuda.test_training import WORDS, Net

STEPS = 8  # until nothing is looked at for the first time

CASES: dict[str, tuple[tuple[int, int], float, dict[str, Any]]] = {
    "bf16, clipped": ((1, 2), 0.0, {}),
    "dropout": ((1, 2), 0.3, {}),
    "recomputed": ((1, 2), 0.3, {"activation_checkpointing": "block"}),
    "no sequence parallelism": ((1, 2), 0.3, {"sequence_parallel": False}),
    "2 x 2": ((2, 2), 0.3, {}),
}


@contextlib.contextmanager
def no_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Model(Net):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.training_step(tokens, 0)


def collectives(step: Any) -> int | None:
    """How many a step sends; None on GPUs that are real."""
    if "pretend_cuda" not in sys.modules:
        step()
        return None
    with sys.modules["pretend_cuda"].HostWaits(collectives=True) as waits:
        step()
    assert {kind for kind, _, _ in waits.found} <= {"collective", "needless stream"}, waits.table()
    return sum(n for (kind, _, _), n in waits.found.items() if kind == "collective")


@pytest.mark.parametrize("what", CASES)
def test_a_steady_step_waits_nowhere(what: str) -> None:
    (dp, tp), dropout, options = CASES[what]
    if dp * tp > torch.cuda.device_count():
        pytest.skip(f"needs {dp * tp} GPUs")

    def body() -> list[int | None]:
        tokens = torch.randint(0, WORDS, (2, 12), generator=torch.Generator().manual_seed(0))
        plan = ltp.infer_plan(Model(dropout), {"tokens": tokens}, tp=tp)
        model = ltp.parallelize(Model(dropout).cuda(), make_mesh("cuda", dp, tp), plan, **options).train()
        optimizer, batch = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), tokens.cuda()

        def step() -> None:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(STEPS):
            step()
        found = []
        for _ in range(2):
            with no_waits():
                found.append(collectives(step))
        return found

    for first, second in run_ranks(body, dp * tp, backend="nccl", timeout=120):
        assert first == second
