"""The rules of a plan: one for each weight, with the reason for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_tp.core.comm.state import I, R
from lightning_tp.infer.assign import assign
from lightning_tp.infer.record import record_calls
from lightning_tp.infer.rules import SMALL_OUTPUT, decisions, explained, fold, write_plan
from lightning_tp.plan.plan import Plan
from lightning_tp.plan.rule import Rule
from lightning_tp.styles import Replicate
from tests.infer.tiny import Tiny, assigned, workload


def rules_of(model: nn.Module, tp: int = 2, kept_whole: Any = None, not_gathered: Any = ()) -> dict[str, Rule]:
    one = workload(model, tp)
    found = assigned(one)
    plan = write_plan(one, found, record_calls(one, found), kept_whole or {}, set(not_gathered))
    return {rule.pattern: rule for rule in plan.rules}


def test_each_weight_has_its_style_and_its_reason() -> None:
    rules = rules_of(Tiny())
    assert {name: rule.style.name for name, rule in rules.items()} == {
        "up": "colwise", "down": "rowwise", "qkv": "colwise", "o": "rowwise", "head": "vocab_head", "": "local_ops", "**": "replicate",
    }  # fmt: skip
    assert rules["up"].reason == "output feeds the row-parallel `down`"
    assert rules["qkv"].style.ranges == (((0, 2), (4, 6), (8, 10)), ((2, 4), (6, 8), (10, 12)))  # type: ignore[attr-defined]


class Gathers(Tiny):
    """A layer of which all features are needed together, and a scale of sharded ones."""

    def __init__(self, width: int = 2 * SMALL_OUTPUT) -> None:
        super().__init__()
        self.wide, self.scale = nn.Linear(4, width), nn.Parameter(torch.ones(9))
        self.late = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(self.up(x).relu() * self.scale.mean())
        return super().forward(x + self.late(self.wide(x).softmax(-1).sort(-1).values))


def gathered(model: nn.Module, not_gathered: Any = ()) -> dict[str, Rule]:
    one, whole = workload(model), frozenset({("wide.weight", 0), ("late.weight", 1)})
    found = assign(one, one.trace(set(whole), {}), whole, {}, dict(model.named_parameters()))
    plan = write_plan(one, found, record_calls(one, found), dict.fromkeys(whole, "because"), set(not_gathered))
    return {rule.pattern: rule for rule in plan.rules if getattr(rule.style, "output", None) == I and rule.style.name == "colwise"}


def test_what_is_needed_together_is_sharded_for_memory_if_it_is_large() -> None:
    assert gathered(Gathers())["wide"].reason == "output all-gathered: because"
    assert "wide" not in gathered(Gathers(2 * SMALL_OUTPUT - 1))
    assert "wide" not in gathered(Gathers(), {"wide"}) and not gathered(Gathers(), {""})


def test_parameters_that_meet_shards_get_a_part_of_their_gradient() -> None:
    class Scaled(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.down(self.up(x).relu() * self.scale))

    rules = rules_of(Scaled())
    assert isinstance(rules["scale"].style, Replicate) and rules["scale"].style.state == R
    assert "scale" not in rules_of(Tiny())


def test_embeddings_are_sharded_if_they_are_large_or_tied_to_a_sharded_head() -> None:
    class Tokens(Tiny):
        def __init__(self, rows: int, tied: bool) -> None:
            super().__init__()
            self.table = nn.Embedding(rows, 4)
            if tied:
                self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.table(torch.zeros(2, 3, dtype=torch.long)))

    assert "table" in rules_of(Tokens(128, False)) and "table" not in rules_of(Tokens(127, False))
    assert rules_of(Tokens(300, True))["table"].style.name == "vocab_embedding"


def test_another_name_of_a_sharded_parameter_has_its_rule() -> None:
    model = Tiny()
    model.never_called = nn.Linear(4, 9)
    model.never_called.weight, model.never_called.bias = model.up.weight, model.up.bias
    rules = rules_of(model)
    assert rules["never_called.weight"].style.dim == rules["never_called.bias"].style.dim == 0  # type: ignore[attr-defined]
    assert rules["never_called.bias"].reason == "another name of a sharded parameter"


RULES = [
    Rule("**", "replicate", "its input is not sharded"),
    Rule("up", "colwise", "feeds `down`"),
    Rule("up.bias", Replicate(state=I), "small"),
]


def test_a_parameter_is_decided_by_the_first_rule_over_it_and_by_the_catch_all_last() -> None:
    found = decisions(RULES, ["up.weight", "up.bias", "norm.weight"])
    assert {n: r.reason for n, r in found.items()} == {
        "up.weight": "feeds `down`",
        "up.bias": "feeds `down`",
        "norm.weight": "its input is not sharded",
    }


def test_equal_rules_of_all_blocks_become_one() -> None:
    model = nn.ModuleList(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]) for _ in range(3))
    some = [Rule("0.0", "colwise", "a"), Rule("1.0", "colwise", "a"), Rule("**", "replicate"), Rule("2.0", "colwise", "a")]
    assert [r.pattern for r in fold(some, model)] == ["0.0", "1.0", "2.0", "**"]  # `*.*` would match the second ones, too
    model = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}) for _ in range(3))
    some = [Rule(f"{i}.a", "colwise", "a") for i in range(3)] + [Rule("0.b", "rowwise"), Rule("**", "replicate")]
    assert [r.pattern for r in fold(some, model)] == ["*.a", "0.b", "**"]
    some[2] = Rule("2.a", "colwise", "another reason")
    assert [r.pattern for r in fold(some, model)] == ["0.a", "1.a", "2.a", "0.b", "**"]


@pytest.mark.parametrize("whole", [{0, 1}, {0}])
def test_what_stays_whole_has_a_rule_that_says_why_and_how_much_it_is(whole: set[int]) -> None:
    parameters = {f"layers.{i}.{n}": torch.zeros(size) for i in range(2) for n, size in (("a", 4), ("b", 1))}
    kept = {(f"layers.{i}.a", 0): "it is odd" for i in whole}
    plan = explained(Plan([Rule("**", "replicate")]), kept, parameters)
    assert {r.pattern: r.reason for r in plan.rules} == {
        "layers.*.a": "it is odd; 80.00% of the parameters",
        "**": "replicated: its input is not sharded; such weights are 20.00% of the parameters",
    }
