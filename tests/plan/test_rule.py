"""Patterns, and rules without sequence parallelism."""

from __future__ import annotations

import pytest

from lightning_tp.plan.plan import Plan
from lightning_tp.plan.rule import Rule
from lightning_tp.styles import (
    PrepareInput,
    PrepareOutput,
    Rowwise,
    VocabEmbedding,
)


@pytest.mark.parametrize(
    "pattern, yes, no",
    [
        ("wq", ["wq"], ["wq.weight", "a.wq", "wqx", "xwq"]),
        ("layers.*.wq", ["layers.0.wq", "layers.11.wq", "layers.last.wq"], ["layers.wq", "layers.0.a.wq", "xlayers.0.wq"]),
        ("layers.*", ["layers.0"], ["layers", "layers.0.wq"]),
        ("w*", ["w", "wq", "wk"], ["wq.weight", "aw"]),
        ("layers.1*.w[q", ["layers.1.w[q", "layers.12.w[q"], ["layers.2.w[q", "layers.1.wq"]),  # nothing else is special
        ("a.b", ["a.b"], ["axb", "a.b.c"]),
        ("*_norm", ["ffn_norm", "_norm"], ["ffn_norm.weight", "ffn.norm"]),
        ("**", ["", "a", "a.b", "a.b.c"], []),
        ("**.wq", ["wq", "a.wq", "a.b.wq"], ["a.wq.b", "awq"]),
        ("a.**", ["a", "a.b", "a.b.c"], ["ab", "b.a"]),
        ("a.**.wq", ["a.wq", "a.b.wq", "a.b.c.wq"], ["wq", "b.a.wq", "a.b"]),
        ("**.attn.*", ["attn.q", "x.y.attn.q"], ["attn", "attn.q.weight"]),
        ("", [""], ["a"]),
    ],
)
def test_patterns(pattern: str, yes: list[str], no: list[str]) -> None:
    rule = Rule(pattern, "replicate")
    assert [name for name in yes if not rule.matches(name)] == []
    assert [name for name in no if rule.matches(name)] == []


def test_sequence_parallel_is_seen_in_any_style() -> None:
    for style in ("sequence", Rowwise(output="S(1)"), VocabEmbedding(output="S(1)"), PrepareInput(wanted="S(1)")):
        assert Plan({"x": style}).sequence_parallel, style
    for style in ("rowwise", "replicate", "vocab_head", PrepareOutput()):
        assert not Plan({"x": style}).sequence_parallel, style
