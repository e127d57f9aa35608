"""The mixin: a LightningModule that splits itself in `configure_model`; with a Trainer it runs in test_strategy."""

from __future__ import annotations

import re
from typing import ClassVar

import lightning as L
import pytest
from torch import nn

import lightning_tp as ltp


class Strategy:
    """Notes what is asked of it."""

    def __init__(self) -> None:
        self.applied: list[nn.Module] = []

    def apply_plan(self, module: nn.Module) -> None:
        self.applied.append(module)


class Trainer:
    def __init__(self, strategy: object) -> None:
        self.strategy = strategy


class Net(ltp.TensorParallel, L.LightningModule):
    plan: ClassVar[dict[str, str]] = {"up": "colwise"}

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(2, 2)


def test_asks_the_strategy_to_apply_the_plan() -> None:
    net = Net()
    net._trainer = Trainer(strategy := Strategy())
    net.configure_model()
    assert strategy.applied == [net]


def test_a_module_that_builds_itself_calls_super_last() -> None:
    class Late(ltp.TensorParallel, L.LightningModule):
        def configure_model(self) -> None:
            self.up = nn.Linear(2, 2)
            super().configure_model()

    net = Late()
    net._trainer = Trainer(strategy := Strategy())
    net.configure_model()
    assert strategy.applied == [net] and net.up.weight is not None


def test_without_a_trainer_or_under_another_strategy_nothing_happens() -> None:
    net = Net()
    weight = net.up.weight
    net.configure_model()
    net._trainer = Trainer(object())
    net.configure_model()
    assert net.up.weight is weight and not hasattr(weight, "_tp_shard")


def test_no_plan_of_its_own_by_default() -> None:
    assert ltp.TensorParallel.plan is None


def test_wrong_order_of_bases_is_refused_when_the_class_is_defined() -> None:
    with pytest.raises(ltp.TPError, match=re.escape("`class Wrong(TensorParallel, LightningModule)`")):

        class Wrong(L.LightningModule, ltp.TensorParallel):
            pass

    class Base(L.LightningModule):
        pass

    with pytest.raises(ltp.TPError, match=re.escape("`class Below(TensorParallel, Base)`")):

        class Below(Base, ltp.TensorParallel):
            pass


def test_right_orders() -> None:
    class Base(L.LightningModule):
        pass

    class Right(ltp.TensorParallel, Base):
        pass

    class Below(Right):
        pass

    class Mixin(ltp.TensorParallel):
        pass

    class Through(Mixin, L.LightningModule):
        pass

    for cls in (Right, Below, Through):
        assert cls.configure_model is ltp.TensorParallel.configure_model
