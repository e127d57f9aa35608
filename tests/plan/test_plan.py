"""A plan as a value: patterns, JSON, equality, digest; and the same plan handed to torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_tp as ltp
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp.plan.plan import Plan
from lightning_tp.plan.rule import Rule
from lightning_tp.styles import (
    Colwise,
    FusedColwise,
    PrepareInput,
    PrepareOutput,
    Replicate,
    Rowwise,
    Sequence,
    VocabEmbedding,
    VocabHead,
)
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks
from tests.harness import mesh

SMALL = LlamaConfig(vocab_size=61, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=36, max_seq_len=32)


def tiny(**changes: Any) -> Llama:
    return Llama(LlamaConfig(**{**SMALL.__dict__, **changes}))


# ------------------------------------------------------------------------------------------------------------ patterns


def test_a_plan_is_relative() -> None:
    """Written for a transformer, it finds it inside a LightningModule, and two modules deep."""

    class Module(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.metric = nn.ParameterDict()
            self.net = inner

    at_root = Plan(PLAN).check(tiny(), tp=2)
    for wrapped, prefix in ((Module(tiny()), "net."), (Module(Module(tiny())), "net.net.")):
        inside = Plan(PLAN).check(wrapped, tp=2)
        assert inside.splits == {prefix + name: split for name, split in at_root.splits.items()}
        assert inside.shapes == {prefix + name: shape for name, shape in at_root.shapes.items()}
        assert [(e.where.removeprefix(prefix.removesuffix(".")).removeprefix("."), e.style) for e in inside.entries] == [
            (e.where, e.style) for e in at_root.entries
        ]


def test_a_relative_plan_covers_what_lies_outside_only_by_its_catch_all() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.probe = tiny(), nn.Linear(3, 3)

    with pytest.raises(
        ltp.TPError, match=r"2 of 23 parameters of Two are not covered by any rule of the plan: `probe.weight` .3, 3., `probe.bias`"
    ):
        Plan(PLAN).check(Two(), tp=2)
    whole = Plan({**PLAN, "**": "replicate"}).check(Two(), tp=2)
    assert whole.splits["probe.weight"].dim is None and whole.splits["net.output.weight"].dim == 0


# ---------------------------------------------------------------------------------------------------------- plain data


def test_of(tmp_path: Path) -> None:
    plan = Plan(PLAN)
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json())
    assert Plan.of(plan) is plan
    assert Plan.of(PLAN) == Plan.of(file) == Plan.of(str(file)) == plan
    with pytest.raises(ltp.TPError, match=r"`plan='.*no_such.json'`: there is no such file. Pass a Plan, a dict"):
        Plan.of(tmp_path / "no_such.json")
    with pytest.raises(ltp.TPError, match=r"there is no such file"):
        Plan.of(str(tmp_path))
    with pytest.raises(ltp.TPError, match=r"`plan=3`: .*Pass a Plan, a dict"):
        Plan.of(3)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------- as a value


def test_equality_is_that_of_rules_and_source() -> None:
    plan = Plan({"a": "colwise", "b": "rowwise"})
    assert plan == Plan([Rule("a", Colwise()), Rule("b", "rowwise")])
    assert plan != Plan({"a": "colwise"}) and plan != Plan({"b": "rowwise", "a": "colwise"})
    assert plan != Plan({"a": Colwise(heads=2), "b": "rowwise"}) and plan != Plan(plan.rules, source="inferred")
    checked = Plan(PLAN).check(tiny(), tp=2)
    assert checked == Plan(PLAN).check(tiny(), tp=2) != Plan(PLAN) and Plan.of(checked) == Plan(PLAN)
    assert len({plan, Plan(plan.rules)}) == 1


def test_checking_changes_neither_the_model_nor_the_plan() -> None:
    model = tiny()
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    plan = Plan(PLAN)
    plan.check(model, tp=4)
    assert plan == Plan(PLAN)
    assert all(id(p) == before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters())
    assert not any(hasattr(p, "_tp_shard") for p in model.parameters())


def test_on_meta() -> None:
    with torch.device("meta"):
        model = tiny()
    assert Plan(PLAN).check(model, tp=2).splits == Plan(PLAN).check(tiny(), tp=2).splits


# ------------------------------------------------------------------------------------------------- sequence parallelism


def test_without_sequence_parallel() -> None:
    rules = {
        "a": "sequence",
        "b": Sequence(input="I"),
        "c": Colwise(input="S(1)", heads=2),
        "d": Rowwise(output="S(1)"),
        "e": VocabEmbedding(output="S(1)"),
        "f": VocabHead(input="S(1)"),
        "g": FusedColwise(input="S(1)", parts=2),
        "h": PrepareInput(arrives="S(1)", arg="x", attributes=(("n", 1),)),
        "i": PrepareInput(arrives="I", wanted="S(1)"),
        "j": PrepareOutput(arrives="S(1)", wanted="I"),
        "k": PrepareOutput(arrives="P", wanted="S(1)"),
        "l": Colwise(),
        "m": Replicate(),
    }
    plan = Plan(rules, source="user-provided")
    whole = plan.without_sequence_parallel()
    assert plan.sequence_parallel and not whole.sequence_parallel
    assert {r.pattern: r.style for r in whole.rules} == {
        "a": Replicate(state="I"),
        "b": Replicate(state="I"),
        "c": Colwise(input="I", heads=2),
        "d": Rowwise(output="I"),
        "e": VocabEmbedding(output="I"),
        "f": VocabHead(input="I"),
        "g": FusedColwise(input="I", parts=2),
        "h": PrepareInput(arg="x", attributes=(("n", 1),)),
        "k": PrepareOutput(arrives="P", wanted="I"),
        "l": Colwise(),
        "m": Replicate(),
    }
    assert whole.without_sequence_parallel() == whole


def test_the_example_without_sequence_parallel_trains_alike() -> None:
    tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))

    def body() -> None:
        whole = randomize_(tiny(bias=True))
        loss_of(whole, tokens).backward()
        gradients = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
        for plan in (Plan(PLAN), Plan(PLAN).without_sequence_parallel()):
            model = randomize_(tiny(bias=True))
            ltp.parallelize(model, mesh(), plan)
            loss = loss_of(model, tokens)
            loss.backward()
            assert_trees_close({"loss": loss}, {"loss": loss_of(whole, tokens)})
            assert_trees_close(ltp.full_gradients(model), gradients)

    run_ranks(body, 2)


# ------------------------------------------------------------------------------------------------------------ for torch


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
