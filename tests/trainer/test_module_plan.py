"""The plan of a LightningModule: traced by its forward or its step, found on one rank, and what is said if it can't be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_tp as ltp
from examples.llama import Llama, LlamaConfig
from lightning_tp.plan.plan import Plan
from lightning_tp.testing import run_ranks, single_rank_mesh
from lightning_tp.trainer.module_plan import (
    applied_plan,
    call_before_split,
    first_batch,
    fsdp_root,
    is_split,
    plan_of_first_rank,
    plan_of_module,
)

CONFIG = LlamaConfig(vocab_size=103, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=48)


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Llama(CONFIG)
        self.logged: list[str] = []

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.log("loss", 0.0)
        return F.cross_entropy(self.model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        raise LookupError("nothing to look up")


def trainer_of(fn: TrainerFn = TrainerFn.FITTING, loader: Any = None) -> Any:
    loader = DataLoader(ltp.RandomTokens(8, 8, 103), batch_size=4, shuffle=True) if loader is None else loader
    source = SimpleNamespace(dataloader=lambda: loader)
    return SimpleNamespace(state=SimpleNamespace(fn=fn), _active_loop=SimpleNamespace(_data_source=source))


@pytest.mark.parametrize("example", [None, torch.zeros(2, 8, dtype=torch.long), {"tokens": torch.zeros(2, 8, dtype=torch.long)}])
def test_it_is_traced_by_its_step_or_its_example(example: Any) -> None:
    """A step logs nothing meanwhile, and the random state stays."""
    module = Net()
    module.example_input_array = example
    state = torch.get_rng_state()
    plan = plan_of_module(module, trainer_of(), 2)
    assert torch.equal(torch.get_rng_state(), state) and "log" not in vars(module)
    styles = {e.where: e.style.name for e in plan.check(module, 2).entries}
    assert styles["model.layers.0.attention.wq"] == "colwise" and styles["model.layers.1.attention.wo"] == "rowwise"


def test_what_its_step_raises_is_said_with_its_line() -> None:
    with pytest.raises(
        ltp.TPError,
        match=r"tracing `Net\.predict_step` raised LookupError: nothing to look up \(at .*test_module_plan\.py:\d+\)\. Set",
    ):
        plan_of_module(Net(), trainer_of(TrainerFn.PREDICTING), 2)


def test_what_its_data_raises() -> None:
    class Broken:
        def __iter__(self) -> Any:
            raise OSError("disk gone")

    with pytest.raises(ltp.TPError) as info:
        plan_of_module(Net(), trainer_of(loader=Broken()), 2)
    text = str(info.value)
    assert text.startswith("Could not infer a plan: tracing `Net.training_step` raised OSError: disk gone (at ")
    assert text.endswith("Set `example_input_array`, or pass `TPStrategy(plan=..)`.")


def test_a_model_that_cannot_be_split() -> None:
    plan = Plan({"**": "replicate"})
    with pytest.raises(
        ltp.TPError, match="would replicate every parameter of Linear on tp=2 ranks, so tensor parallelism brings nothing"
    ):
        plan_of_first_rank(lambda: plan, nn.Linear(2, 2), 2, traced="x", remedy="do it")


def test_all_ranks_get_what_the_first_one_finds() -> None:
    def body() -> tuple[Any, str]:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        calls = []

        def find() -> Plan:
            calls.append(0)
            return Plan({"0": "colwise", "1": "rowwise"}, source="found")

        found = plan_of_first_rank(find, model, 2, traced="x", remedy="do it")
        assert not calls  # in a child of rank 0
        with pytest.raises(ltp.TPError) as info:
            plan_of_first_rank(lambda: 1 / 0, model, 2, traced="N.step", remedy="do it")  # type: ignore[arg-type, return-value]
        return (found.source, len(found.rules)), str(info.value).partition(" (at")[0]

    expected = ("found", 2), "Could not infer a plan: tracing `N.step` raised ZeroDivisionError: division by zero"
    assert run_ranks(body, 2) == [expected] * 2


def test_a_first_batch_is_small_and_on_the_cpu() -> None:
    loader = DataLoader(range(100), batch_size=50, shuffle=True)  # type: ignore[arg-type]
    state = torch.get_rng_state()
    assert first_batch(trainer_of(loader=loader)).tolist() == [0, 1]
    assert torch.equal(torch.get_rng_state(), state)


def test_what_was_applied() -> None:
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    with single_rank_mesh() as mesh:
        inner = ltp.parallelize(nn.Linear(2, 2), mesh, {"": "replicate"})
    outer = Outer(inner)
    assert applied_plan(None) is None and applied_plan(nn.Linear(2, 2)) is None
    assert applied_plan(outer) is applied_plan(inner) is not None
    assert is_split(outer, 1) and not is_split(nn.Linear(2, 2), 4)
    with pytest.raises(ltp.TPError, match="split for tp=1 already, and the strategy has tp=2"):
        is_split(outer, 2)


def test_what_a_step_calls() -> None:
    net = Net()
    assert fsdp_root(net) is net.model
    net.loss = nn.CrossEntropyLoss()  # without parameters
    assert fsdp_root(net) is net.model
    net.head = nn.Linear(1, 1)
    assert fsdp_root(net) is net
    flat = Net()
    flat.scale = nn.Parameter(torch.ones(1))
    assert fsdp_root(flat) is flat


def test_callbacks_that_want_the_full_model() -> None:
    called: list[Any] = []

    class Wants(L.Callback):
        def before_split(self, trainer: Any, module: Any) -> None:
            called.append((trainer, module))

    trainer: Any = SimpleNamespace(callbacks=[L.Callback(), Wants()])
    call_before_split(trainer, net := Net())
    assert called == [(trainer, net)]
