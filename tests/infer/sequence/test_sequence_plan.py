"""What the search for sequence parallelism passes on."""

from __future__ import annotations

from lightning_tp.infer.sequence.sequence_plan import Alternatives, NotSequenceParallel, Reduction, Region, SequencePlan


def test_plans_of_two_streams_are_joined() -> None:
    one = SequencePlan(
        {("a.0", "a.1"): 0}, {"a.0.mlp": Region("a.0.mlp", Reduction.AT_RETURN)}, {"a.0.down"}, on_shards={("w", "a.0")}
    )
    two = SequencePlan({("b.0", "b.1"): "x"}, {}, {"b.0.down"}, {"b.1.down"}, length_reads={"b": []})
    both = one | two
    assert both.streams == {("a.0", "a.1"): 0, ("b.0", "b.1"): "x"}
    assert set(both.regions) == {"a.0.mlp"} and both.length_reads == {"b": []}
    assert both.reduced_layers == {"a.0.down", "b.0.down"} and both.deferred_layers == {"b.1.down"}
    assert both.on_shards == {("w", "a.0")} and not both.on_full


def test_a_region_reduces_at_return_what_it_has_made() -> None:
    assert Region("mlp", Reduction.AT_RETURN, reduced=True).reduces_at_return
    assert not Region("mlp", Reduction.AT_RETURN, reduced=False).reduces_at_return
    assert not Region("mlp", Reduction.OF_STREAM, reduced=True).reduces_at_return


def test_reductions_are_tried_in_order() -> None:
    assert sorted(Reduction) == [Reduction.OF_STREAM, Reduction.OF_ANY_WIDTH, Reduction.AT_RETURN, Reduction.OPENED]


def test_a_refusal_says_why_and_where() -> None:
    refusal = NotSequenceParallel("tokens meet", {"a.0.mlp"}, other_width=["a.0"])
    assert (str(refusal), refusal.modules, refusal.other_width) == ("tokens meet", {"a.0.mlp"}, {"a.0"})
    assert refusal.alternatives == Alternatives()
