from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_tp.errors import TPError
from lightning_tp.plan.plan import Plan
from lightning_tp.verify.task import Task
from lightning_tp.verify.train import FIRST_STEP, default_lr, perturb_constants, train

PLAN = Plan({"*": "replicate"})


def task(dp: int, steps: int = 2) -> Task:
    x = torch.tensor([[1.0], [3.0]])
    return Task(lambda: nn.Linear(1, 1), (x,), torch.mean, 1, dp, None, steps, 1e-3, None, True, True, 0)


def test_steps_of_sgd_by_hand() -> None:
    """The loss is mean(w x + b): its gradient is (mean x, 1) = (2, 1) at each step."""
    model = task(1).build_model()
    w = model.weight.item()  # type: ignore[union-attr,operator]
    run = train(model, task(1), PLAN, 0.5, range(1))
    assert {n: g.item() for n, g in run.gradients.items()} == {"weight": 2, "bias": 1}
    assert run.start["weight"].item() == w
    assert run.losses[1] == pytest.approx(run.losses[0] - 0.5 * (2 * 2 + 1 * 1), rel=1e-5)
    assert run.weights["weight"].item() == pytest.approx(w - 2 * 0.5 * 2, rel=1e-5) and run.lr == 0.5


def test_micro_batches_add_up_to_the_batch() -> None:
    whole, parts = (train(task(dp).build_model(), task(dp), PLAN, 0.1, range(dp)) for dp in (1, 2))
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
