from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_tp.errors import TPError
from lightning_tp.plan.plan import Plan
from lightning_tp.verify.training import FIRST_STEP, Task, as_inputs, default_lr, perturb_constants, scalar_loss, train

PLAN = Plan({"*": "replicate"})


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
    with pytest.raises(TPError, match=r"a tensor of shape \(3, 1\), but has to return a scalar"):
        scalar_loss(double, (x,), lambda y: y)
    with pytest.raises(TPError, match="a float, but has to return a scalar"):
        scalar_loss(double, (x,), lambda y: y.sum().item())


def short_task(dp: int, steps: int = 2) -> Task:
    x = torch.tensor([[1.0], [3.0]])
    return Task(lambda: nn.Linear(1, 1), (x,), torch.mean, 1, dp, None, steps, 1e-3, None, True, True, 0)


def test_steps_of_sgd_by_hand() -> None:
    """The loss is mean(w x + b): its gradient is (mean x, 1) = (2, 1) at each step."""
    model = short_task(1).build_model()
    w = model.weight.item()  # type: ignore[union-attr,operator]
    run = train(model, short_task(1), PLAN, 0.5, range(1))
    assert {n: g.item() for n, g in run.gradients.items()} == {"weight": 2, "bias": 1}
    assert run.start["weight"].item() == w
    assert run.losses[1] == pytest.approx(run.losses[0] - 0.5 * (2 * 2 + 1 * 1), rel=1e-5)
    assert run.weights["weight"].item() == pytest.approx(w - 2 * 0.5 * 2, rel=1e-5) and run.lr == 0.5


def test_micro_batches_add_up_to_the_batch() -> None:
    whole, parts = (train(short_task(dp).build_model(), short_task(dp), PLAN, 0.1, range(dp)) for dp in (1, 2))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-6)
    for name, t in whole.weights.items():
        torch.testing.assert_close(parts.weights[name], t)


def test_the_first_step_moves_the_weights_by_a_share_of_their_norm() -> None:
    weights, gradients = {"w": torch.tensor([3.0, 4.0]), "buffer": torch.ones(9)}, {"w": torch.tensor([0.0, 2.0])}
    assert default_lr(weights, gradients) == pytest.approx(FIRST_STEP * 5 / 2)
    for bad in (0.0, torch.inf, torch.nan):
        with pytest.raises(TPError, match="norm of all gradients is"):
            default_lr(weights, {"w": torch.tensor([bad])})


def test_constants_are_perturbed_and_nothing_else() -> None:
    model = nn.ModuleDict({"norm": nn.LayerNorm(8), "linear": nn.Linear(8, 8), "other": nn.LayerNorm(8)})
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    perturb_constants(model)
    moved = {n: (p - before[n]).detach() for n, p in model.named_parameters()}
    assert not moved["linear.weight"].any() and not moved["linear.bias"].any()
    assert 0.02 < moved["norm.weight"].std() < 0.3 and moved["norm.bias"].std() > 0.02
    assert not torch.equal(moved["norm.weight"], moved["other.weight"])
