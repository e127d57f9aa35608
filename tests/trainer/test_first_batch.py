"""`TPStrategy(verify=True)`: the first batch in one process and split, before anything is trained."""

from __future__ import annotations

import re
from typing import Any

import lightning as L
import pytest
import torch

import lightning_tp as ltp
from lightning_tp.errors import TPError
from lightning_tp.testing import RankError
from tests.trainer.test_strategy import TP2, Flat, Net, assert_same, both, data, on, reference, result_of, strategy, trainer_of


class Wrong(ltp.TPStrategy):
    """Changes a weight on one rank, as a wrong plan might."""

    def __init__(self, *, scale: float = 1.1, **options: Any) -> None:
        super().__init__(**options)
        self.scale = scale

    def model_to_device(self) -> None:
        super().model_to_device()
        if self.global_rank == 1:
            with torch.no_grad():
                next(p for n, p in self.lightning_module.named_parameters() if n.endswith("wo.weight")).mul_(self.scale)


class Dropping(Net):
    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        return torch.nn.functional.dropout(super().loss(batch), 0.5, self.training)


class Casting(Net):
    """Computes in half precision by an autocast of its own."""

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            return super().loss(batch)


class Noisy(Net):
    """Draws on its device."""

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        return super().loss(batch) * (1 + torch.rand((), device=self.device))


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def message_of(module: Any, chosen: Any) -> str:
    """What the first rank shows, before a step; the others end by themselves."""

    def body() -> None:
        try:
            trainer_of(chosen).fit(module, data())
        except TPError:
            assert module.losses == []
            raise

    with pytest.raises(RankError) as caught:
        on(2, body)
    return caught.value.errors[0].message


@both
def test_training_goes_on_as_without(mesh: tuple[int, int]) -> None:
    def body() -> list[Any]:
        found = []
        for make in (Net, Flat):
            trainer, module = trainer_of(strategy(mesh, verify=True, plan=None)), make()
            trainer.fit(module, data(mesh[0]))
            found.append(result_of(trainer, module))
        return found

    for results in zip(*on(mesh[0] * mesh[1], body), strict=True):
        assert_same(list(results), reference())


def test_what_differs_is_found_before_the_first_step() -> None:
    message = message_of(Net(), Wrong(tp=2, verify=True))
    assert "on the first batch the split model does not match one process" in message
    assert "grad of model.layers." in message and "allowed 0.001" in message
    assert "does not match one process" in message_of(Casting(), Wrong(tp=2, verify=True, scale=2.0))


def test_precision_and_dropout() -> None:
    """bf16 rounds differently when split; dropout is off in both runs and on again after them."""

    def body() -> list[bool]:
        trained = []
        for precision, make in (("bf16-mixed", Net), ("32-true", Dropping), ("32-true", Casting), ("32-true", Noisy)):
            module = make()
            trainer_of(strategy(TP2, verify=True), precision=precision).fit(module, data())
            trained.append(module.training and len(module.losses) == 3)
        return trained

    assert all(all(r) for r in on(2, body))


def test_what_cannot_be_verified_is_refused() -> None:
    assert "this module steps its optimizers by itself" in message_of(Manual(), strategy(TP2, verify=True))


class Halves(L.LightningModule):
    """Two linear layers in turn, by a plan that somebody wrote."""

    def __init__(self, gated: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gated, self.losses = gated, []
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(8 if gated else 16, 8)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        x = self.up(batch)
        if self.gated:
            gate, x = x.chunk(2, -1)
            x = gate.sigmoid() * x
        self.losses.append(loss := self.down(x).square().mean())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


PAIR = {"up": "colwise", "down": "rowwise"}
PLANS = {
    "a fused weight": (True, PAIR, "`up`: by the plan, .*`fused_colwise`.*gives other numbers than one process: .*differ"),
    "swapped": (False, {"up": "rowwise", "down": "colwise"}, "`up`: it does not run on shards .*raises RuntimeError: mat1"),
    "one half": (False, {"up": "colwise", "down": "replicate"}, "`down`: it does not run on shards .*raises RuntimeError"),
    "right": (False, PAIR, ""),
}


@pytest.mark.parametrize("kind", PLANS)
def test_a_plan_that_somebody_wrote(kind: str) -> None:
    gated, rules, text = PLANS[kind]

    def body() -> int:
        module = Halves(gated)
        trainer_of(ltp.TPStrategy(tp=2, plan=rules)).fit(module, torch.utils.data.DataLoader(torch.randn(4, 3, 8), batch_size=2))
        return len(module.losses)

    if not text:
        assert on(2, body) == [2, 2]  # nothing was run beside the steps
        return
    with pytest.raises(RankError) as caught:
        on(2, body)
    message = caught.value.errors[0].message
    assert message.startswith("The plan does not fit the model: ") and re.search(text, message, re.DOTALL), message
