"""Which modules the patterns of a plan match, and what is said of those that match nothing."""

from __future__ import annotations

from torch import nn

from examples.llama import PLAN
from lightning_tp.plan.plan import Plan
from lightning_tp.plan.rule import Rule
from lightning_tp.styles import Replicate
from tests.plan.test_check import MLP, SPLIT, blocks, refuses, tiny


def test_a_rule_that_matches_nothing() -> None:
    model = tiny()
    refuses(
        {**PLAN, "layers.*.attention.qw": "colwise"},
        model,
        "The rule `layers.*.attention.qw` -> `colwise` matches no module",
        "`layers.*.attention.wq`",
        "names)",
        "Did you mean",
    )
    refuses({**PLAN, "attention": "replicate"}, model, "`attention` -> `replicate` matches no module")
    refuses({"encoder.block": "colwise"}, nn.Linear(2, 2), "matches no module or parameter", "`weight`")


def test_it_says_where_it_looked() -> None:
    model = nn.ModuleDict({"net": tiny()})
    refuses({**PLAN, "layers.*.mlp.w1": "colwise"}, model, "`layers.*.mlp.w1`", "of `net`", "`layers.*.feed_forward.w1`")


def test_one_rule_that_matches_a_container_and_what_it_holds() -> None:
    """`head.**` is the module, its children and their parameters: one thing, said once."""
    model = nn.ModuleDict(
        {"blocks": nn.ModuleList([MLP(), MLP()]), "head": nn.Sequential(nn.Linear(8, 4), nn.Sequential(nn.LayerNorm(4)))}
    )
    for style in ("replicate", "sequence"):
        plan = Plan({**SPLIT, "blocks.*.norm": "replicate", "head.**": style}).check(model, tp=2)
        assert [e.where for e in plan.entries if e.where.startswith("head")] == ["head"]
        assert {n for n in plan.splits if n.startswith("head")} == {
            "head.0.weight",
            "head.0.bias",
            "head.1.0.weight",
            "head.1.0.bias",
        }


def test_the_catch_all_gives_way() -> None:
    plan = Plan({**SPLIT, "**": "replicate"}).check(blocks(), tp=2)
    whole = [e for e in plan.entries if isinstance(e.style, Replicate)]
    assert [e.where for e in whole] == [f"blocks.{i}.norm.{n}" for i in range(2) for n in ("weight", "bias")]
    assert {e.reason for e in whole} == {"no other rule names it"}
    plan = Plan([*Plan(SPLIT).rules, Rule("**", "replicate", "on purpose")]).check(blocks(), tp=2)
    assert {e.reason for e in plan.entries if isinstance(e.style, Replicate)} == {"on purpose"}


def test_the_catch_all_can_only_replicate() -> None:
    refuses({**SPLIT, "**": "sequence"}, blocks(), "`**` can only be `replicate`, not `sequence`: name the modules")
