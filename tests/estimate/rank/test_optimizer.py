from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_tp import TPError
from lightning_tp.estimate import estimate
from lightning_tp.estimate.rank.optimizer import KNOWN, OptimizerCost, known_optimizer, optimizer_cost
from tests.estimate.by_hand import ROWS, model_of, step
from tests.estimate.models import TOKENS, meta_llama

PARAMS = model_of(step()).params
HELD = 4 * sum(ROWS.values())
LARGEST = 4 * max(ROWS.values())


def test_optimizers() -> None:
    def of(**options: Any) -> Any:
        return estimate(meta_llama(), TOKENS, (4, 2), **options)

    weights = of().memory.parameters
    assert of(optimizer="adamw").memory.optimizer == 2 * weights
    assert of(optimizer="sgd").memory.optimizer == 0
    assert of(optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)).memory.optimizer == weights
    assert of(optimizer=torch.optim.Adam).memory.optimizer == 2 * weights


@pytest.mark.parametrize(
    ("name", "states"), [("adamw", 2), ("adam", 2), ("sgd", 0), ("momentum", 1), ("adagrad", 1), ("rmsprop", 1)]
)
def test_state_and_traffic(name: str, states: int) -> None:
    found = optimizer_cost(name, PARAMS, foreach=False)
    assert found.state == states * HELD
    assert found.traffic == (3 + 2 * states) * HELD  # gradients read, parameters and states read and written
    assert found.scratch <= 2 * LARGEST  # one parameter after the other


def test_foreach_needs_scratch_for_all_parameters_at_once() -> None:
    found = optimizer_cost("adamw", PARAMS, foreach=True)
    assert found.scratch == HELD  # a copy of one state
    assert found.traffic == 7 * HELD + 4 * found.scratch


def test_each_shape_steps_once() -> None:
    steps: list[int] = []

    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            steps.append(1)
            return super().step(closure)

    known: dict[Any, OptimizerCost] = {}
    for _ in range(2):
        optimizer_cost(Counting, [*PARAMS, *PARAMS], foreach=False, known=known)
    assert len(known) == len(PARAMS) and len(steps) == 2 * len(PARAMS)  # the first step makes the state, the second is measured


def test_mistakes() -> None:
    assert known_optimizer("AdamW") is KNOWN["adamw"]
    with pytest.raises(TPError, match=r"Unknown `optimizer='lion'`. Valid are adamw, "):
        known_optimizer("lion")

    class Raises(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise ValueError("no values")

    with pytest.raises(TPError, match=r"can't step on a parameter of shape \(10,\) on the meta device: ValueError: no values"):
        optimizer_cost(Raises, PARAMS, foreach=False)
