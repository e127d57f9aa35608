"""Rules as JSON, there and back."""

from __future__ import annotations

import json

import pytest

import lightning_tp as ltp
from examples.llama import PLAN
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
    Style,
    VocabEmbedding,
    VocabHead,
)
from tests.plan.test_plan import tiny

EVERY: list[Style] = [
    Colwise(),
    Colwise(heads=8, query_heads=16, input="S(1)", output="I"),
    Colwise(ranges=(((0, 4), (6, 7)), ((4, 6), (7, 9)))),
    Rowwise(),
    Rowwise(input="I", output="S(1)"),
    Rowwise(ranges=(((0, 4),), ((4, 9),))),
    FusedColwise(),
    FusedColwise(parts=(64, 16, 16), heads=(4, 1, 1), input="R"),
    FusedColwise(parts=2, heads=8),
    FusedColwise(parts=(6, 6), heads=(2, None)),  # type: ignore[arg-type]
    Sequence(),
    Sequence(input="I", output="I"),
    VocabEmbedding(),
    VocabEmbedding(output="S(1)"),
    VocabHead(),
    VocabHead(input="S(1)"),
    Replicate(),
    Replicate(state="R"),
    Replicate(state="I"),
    PrepareInput(),
    PrepareInput(arrives="S(1)", wanted="I", arg="hidden_states", attributes=(("groups", 2), ("heads", 4))),
    PrepareInput(arg=0),
    PrepareOutput(),
    PrepareOutput(arrives="P", wanted="S(1)", index=2),
]


RULES_THAT_ARE_NONE = ["3", '[{"pattern": "a"}]', '[["a", "colwise"]]', '[{"pattern": "a", "style": "colwise", "options": 3}]']


def test_json_round_trip_of_every_style_with_options() -> None:
    plan = Plan([Rule(f"m{i}.*", style, f"reason {i}") for i, style in enumerate(EVERY)], source="declared by Nobody")
    again = Plan.from_json(plan.to_json())
    assert again == plan and hash(again) == hash(plan)
    assert again.rules == plan.rules and [r.style for r in again.rules] == EVERY
    assert [r.reason for r in again.rules] == [f"reason {i}" for i in range(len(EVERY))]
    assert (again.source, again.digest) == ("declared by Nobody", plan.digest)
    data = json.loads(plan.to_json())
    assert data["version"] == 1 and data["rules"][0] == {"pattern": "m0.*", "style": "colwise", "options": {}, "reason": "reason 0"}


def test_json_of_a_checked_plan_has_its_rules_alone() -> None:
    plan = Plan(PLAN)
    assert plan.check(tiny(), tp=2).to_json() == plan.to_json()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '"colwise"', "{}", *(f'{{"rules": {rules}}}' for rules in RULES_THAT_ARE_NONE)]
)
def test_bad_json(text: str) -> None:
    with pytest.raises(ltp.TPError, match=r"This is not a plan.*`Plan.to_json`"):
        Plan.from_json(text)


def test_json_with_a_style_or_an_option_that_there_is_not() -> None:
    with pytest.raises(ltp.TPError, match=r"`a.b`: unknown style.*'columns'"):
        Plan.from_json('{"rules": [{"pattern": "a.b", "style": "columns"}]}')
    with pytest.raises(ltp.TPError, match=r"`a.b`: .*'headz'"):
        Plan.from_json('{"rules": [{"pattern": "a.b", "style": "colwise", "options": {"headz": 2}}]}')
