"""The plan that a module has as an attribute."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from lightning_tp import Plan
from lightning_tp.cli.targets.target import plan_of_module


@pytest.mark.parametrize("plan", [Plan({"*": "replicate"}), {"*": "replicate"}, "plan.json", Path("plan.json")])
def test_what_can_be_a_plan(plan: object) -> None:
    model = nn.Linear(2, 2)
    assert plan_of_module(model) is None
    model.plan = plan  # type: ignore[assignment]
    assert plan_of_module(model) is plan


def test_another_attribute_of_that_name() -> None:
    model = nn.Linear(2, 2)
    model.plan = nn.Linear(1, 1)
    assert plan_of_module(model) is None
