"""What follows for names and rules from blocks that do the same."""

from __future__ import annotations

from lightning_tp.infer.blocks.repeated import RepeatedBlocks
from lightning_tp.plan.rule import Rule
from lightning_tp.styles import PrepareInput, Replicate

BLOCKS = RepeatedBlocks({"layers.2": "layers.0", "layers.3": "layers.1", "layers.4": "layers.0"})


def test_names_in_a_copy_are_those_in_its_representative() -> None:
    names = ["layers.2", "layers.4.up.weight", "layers.20.up", "layers.0.up", "head", ""]
    assert [BLOCKS.representative(n) for n in names] == [
        "layers.0",
        "layers.0.up.weight",
        "layers.20.up",
        "layers.0.up",
        "head",
        "",
    ]


def test_rules_are_expanded_to_copies_but_for_the_boundaries_of_blocks() -> None:
    rules = [
        Rule("layers.0.up", "colwise", "why"),
        Rule("layers.0", PrepareInput()),
        Rule("layers.1", Replicate()),
        Rule("head", "colwise"),
    ]
    expanded = BLOCKS.expand_to_copies(rules)
    assert expanded[:4] == rules
    assert [(r.pattern, r.style.name, r.reason) for r in expanded[4:]] == [
        ("layers.2.up", "colwise", "why"),
        ("layers.3", "replicate", ""),
        ("layers.4.up", "colwise", "why"),
    ]


def test_a_block_that_runs_is_no_copy() -> None:
    assert BLOCKS.without({"layers.2", "layers.0"}).copies == {"layers.3": "layers.1", "layers.4": "layers.0"}


def test_copies_of_another_kind_have_a_representative_of_their_own_kind() -> None:
    blocks = RepeatedBlocks({f"b{i}": "b0" for i in range(1, 6)})
    kinds = {"b0": "x", "b1": "y", "b2": "x", "b3": "y", "b4": "x"}  # b5 is of no kind, and stands alone
    assert blocks.refined(kinds).copies == {"b2": "b0", "b3": "b1", "b4": "b0"}
