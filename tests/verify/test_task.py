from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_tp.errors import TPError
from lightning_tp.verify.task import Task, as_inputs, scalar_loss


def task(**changes: Any) -> Task:
    values: dict[str, Any] = dict(
        model_fn=lambda: nn.Dropout(), inputs=(torch.ones(1),), loss_fn=torch.sum, tp=2, dp=1, plan=None, steps=1, rtol=1e-3, lr=None,
        sequence_parallel=True, loss_parallel=True, seed=0,
    )  # fmt: skip
    return Task(**{**values, **changes})


@pytest.mark.parametrize(("name", "value"), [("tp", 0), ("dp", -1), ("steps", True), ("steps", 1.0)])
def test_sizes_below_one_are_refused(name: str, value: object) -> None:
    with pytest.raises(TPError, match=f"{name}={value}"):
        task(**{name: value})


def test_the_model_is_the_same_each_time_and_in_eval_mode() -> None:
    same = task(model_fn=lambda: nn.Linear(3, 3))
    one, two = same.build_model(), same.build_model()
    assert torch.equal(one.weight, two.weight) and not one.training  # type: ignore[arg-type]
    assert not torch.equal(one.weight, task(model_fn=lambda: nn.Linear(3, 3), seed=1).build_model().weight)  # type: ignore[arg-type]


def test_batches_differ_by_step_and_seed_alone() -> None:
    drawn = task(inputs=lambda: torch.rand(3))
    (a,), (b,), (again,) = drawn.batch(0), drawn.batch(1), drawn.batch(0)
    assert torch.equal(a, again) and not torch.equal(a, b)
    assert not torch.equal(a, task(inputs=lambda: torch.rand(3), seed=5).batch(0)[0])  # type: ignore[index]


def test_rows_of_a_data_parallel_rank() -> None:
    x, scale = torch.arange(12).view(6, 2), torch.tensor(2.0)
    batch = {"scale": scale, "x": x, "table": torch.arange(5), "flag": True, "more": [x]}
    for dp_rank in range(3):
        part: Any = task(dp=3).micro_batch(batch, dp_rank)
        assert torch.equal(part["x"], x[2 * dp_rank : 2 * dp_rank + 2]) and torch.equal(part["more"][0], part["x"])
        assert part["scale"] is scale and len(part["table"]) == 5 and part["flag"] is True
    assert task(dp=1).micro_batch(batch, 0) is batch
    with pytest.raises(TPError, match=r"6 rows \(dim 0\), which dp=4 does not divide. Pass inputs with 24 rows"):
        task(dp=4).micro_batch(batch, 0)


def test_a_loss_of_the_output_or_of_output_and_inputs() -> None:
    double = nn.Linear(1, 1, bias=False)
    nn.init.constant_(double.weight, 2.0)
    x = torch.ones(3, 1)
    assert scalar_loss(double, as_inputs(x), torch.sum) == 6
    assert scalar_loss(double, {"input": x}, lambda y, inputs: (y + inputs["input"]).sum()) == 9
    assert scalar_loss(double, (x,), lambda y, scale=2: (y * scale).sum().view(1, 1)).shape == ()
    with pytest.raises(TPError, match=r"a tensor of shape \(3, 1\); it has to be a scalar"):
        scalar_loss(double, (x,), lambda y: y)
    with pytest.raises(TPError, match="a float; it has to be a scalar"):
        scalar_loss(double, (x,), lambda y: y.sum().item())
