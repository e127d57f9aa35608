"""The plan as people read it: what is said of the example, how blocks fold, what the numbers add up to."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp.core.modules.blocks import fold
from lightning_tp.plan.plan import Plan
from lightning_tp.plan.rule import Rule
from lightning_tp.styles import FusedColwise, Replicate


def lines(text: str) -> list[str]:
    """Its lines, with single spaces."""
    return [" ".join(line.split()) for line in text.splitlines()]


def example(**changes: Any) -> nn.Module:
    return Llama(LlamaConfig(**{"vocab_size": 1003, "hidden_dim": 341, "num_kv_heads": 2, **changes}))


def test_the_example() -> None:
    assert lines(str(Plan(PLAN).check(example(), tp=4))) == [
        "Plan (user-provided), tp=4: 945,536 parameters, up to 246,656 per rank (26.1%); sequence parallelism on",
        "modules style full shape -> local shard reason",
        "tok_embeddings vocab_embedding(output=S(1)) (1003, 128) -> (251, 128) | (250, 128)",
        "layers.{0-3}.attention_norm sequence (128,) gradient summed over 4 ranks",
        "layers.{0-3}.attention prepare_input(arrives=S(1)) input all-gathered once for wq, wk, wv; wo reduces",
        "layers.{0-3}.attention.wq colwise(heads=8, query_heads=8, input=R) (128, 128) -> (32, 128)",
        "layers.{0-3}.attention.wk colwise(heads=2, query_heads=8, input=R) (32, 128) -> (16, 128) gradient summed over 2 ranks",
        "layers.{0-3}.attention.wv colwise(heads=2, query_heads=8, input=R) (32, 128) -> (16, 128) gradient summed over 2 ranks",
        "layers.{0-3}.attention.wo rowwise(output=S(1)) (128, 128) -> (128, 32)",
        "layers.{0-3}.ffn_norm sequence (128,) gradient summed over 4 ranks",
        "layers.{0-3}.feed_forward prepare_input(arrives=S(1)) input all-gathered once for w1, w3; w2 reduces",
        "layers.{0-3}.feed_forward.w{1,3} colwise(input=R) (341, 128) -> (86, 128) | (83, 128)",
        "layers.{0-3}.feed_forward.w2 rowwise(output=S(1)) (128, 341) -> (128, 86) | (128, 83)",
        "norm sequence (128,) gradient summed over 4 ranks",
        "output vocab_head(input=S(1)) (1003, 128) -> (251, 128) | (250, 128)",
    ]


def test_columns_are_aligned() -> None:
    _, head, *rows = str(Plan(PLAN).check(example(), tp=2)).splitlines()
    for column in ("style", "full shape -> local shard"):
        at = head.index(column)
        assert all(row[at - 2 : at] == "  " and row[at : at + 1] != "" for row in rows)
    assert not any(row != row.rstrip() for row in rows)


def test_rules_before_a_model_is_known() -> None:
    plan = Plan([Rule("a.*", "colwise", "read by b"), Rule("b", FusedColwise(parts=2))], source="declared by Net")
    assert lines(str(plan)) == [
        "Plan (declared by Net): 2 rules",
        "modules style reason",
        "a.* colwise read by b",
        "b fused_colwise(parts=2)",
    ]


def test_several_parameters_of_one_module() -> None:
    model = nn.Sequential(nn.Linear(4, 12), nn.Linear(12, 4), nn.LayerNorm(4))
    plan = Plan({"0": FusedColwise(parts=3), "1": "rowwise", "2": Replicate(state="I")}).check(model, tp=2)
    table = lines(str(plan))
    assert table[0] == "Plan (user-provided), tp=2: 120 parameters, up to 66 per rank (55.0%); sequence parallelism off"
    assert table[2:] == [
        "0 fused_colwise(input=I) (12, 4) -> (6, 4); (12,) -> (6,)",
        "1 rowwise(output=I) (4, 12) -> (4, 6); (4,)",
        "2 replicate(state=I) (4,)",
    ]


def test_what_a_catch_all_keeps_whole_is_listed_with_its_reason() -> None:
    rules = {p: s for p, s in PLAN.items() if "norm" not in p}
    table = str(Plan({**rules, "**": "replicate"}).check(example(), tp=2))
    assert "layers.{0-3}.attention_norm.weight" in table and "no other rule names it" in table
    assert "sequence parallelism off" in table


def test_blocks_that_differ_are_lines_of_their_own() -> None:
    model = nn.ModuleDict({"b": nn.ModuleList(nn.Linear(4, 8 if i == 2 else 6) for i in range(5)), "out": nn.Linear(8, 4)})
    table = lines(str(Plan({"b.*": "colwise", "out": "rowwise"}).check(model, tp=2)))
    assert [row.split()[0] for row in table[2:]] == ["b.{0-1,3-4}", "b.2", "out"]


def test_fold() -> None:
    assert fold(["layers.0.wq"]) == "layers.0.wq"
    assert fold([f"layers.{i}.wq" for i in range(12)]) == "layers.{0-11}.wq"
    assert fold([f"layers.{i}.wq" for i in (0, 2, 3, 9)]) == "layers.{0,2-3,9}.wq"
    assert fold([f"b.{i}.e.{j}.w" for i in range(2) for j in range(3)]) == "b.{0-1}.e.{0-2}.w"
    assert fold(["w1", "w3"]) == "w{1,3}"


def test_numbers_are_those_of_the_model_and_of_the_largest_shard() -> None:
    for changes in ({}, {"tied": True}, {"bias": True}):
        for tp in (1, 2, 4):
            model = example(**changes)
            plan = Plan(PLAN).check(model, tp)
            total = plan.numel
            assert total == sum(p.numel() for p in model.parameters())
            ranks = [
                sum(math.prod(s.local_shape(plan.shapes[n], rank)) for n, s in plan.splits.items() if n not in plan.tied)
                for rank in range(tp)
            ]
            assert [plan.local_numel(rank) for rank in range(tp)] == ranks
            assert f"{total:,} parameters, up to {max(ranks):,} per rank" in str(plan)
    with torch.device("meta"):
        on_meta = Plan(PLAN).check(example(), tp=2)
    plan = Plan(PLAN).check(example(), tp=2)
    assert (on_meta.numel, on_meta.local_numel(0)) == (plan.numel, plan.local_numel(0))
