"""What a plan says where streams are sharded along the sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_tp.core.comm.state import SEQUENCE, WIDTH, I, P, R
from lightning_tp.infer.blocks.repeated import RepeatedBlocks
from lightning_tp.infer.blocks.workload import Workload
from lightning_tp.infer.follow.trace import TensorFacts
from lightning_tp.infer.follow.tracer import FeatureTracer
from lightning_tp.infer.sequence.boundaries import Replanned
from lightning_tp.infer.sequence.rules import calls_in_turn, rules_by_name, shard_streams, sharded_names
from lightning_tp.infer.sequence.sequence_plan import NotSequenceParallel, Reduction, Region, SequencePlan
from lightning_tp.plan.plan import Plan
from lightning_tp.plan.rule import Rule
from lightning_tp.styles import Colwise, PrepareInput, PrepareOutput, Replicate, RewrittenCalls, Rowwise, Sequence, ShardParameter
from lightning_tp.styles.calls.call import Call


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(4), nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)})


def model(depth: int = 2) -> nn.Module:
    return nn.ModuleDict({"blocks": nn.ModuleList(Block() for _ in range(depth)), "out": nn.Linear(4, 4)})


REPLICATE = Rule("**", Replicate(state=I))
RULES = [Rule("blocks.*.mlp.up", Colwise(input=I)), Rule("blocks.*.mlp.down", Rowwise(input=WIDTH, output=I)), REPLICATE]
NORMS = frozenset((f"blocks.{i}.norm.{p}", f"blocks.{i}.norm") for i in range(2) for p in ("weight", "bias"))


def sharded(
    rules: list[Rule] = RULES, inputs: Any = R, depth: int = 2, blocks: Any = None, uses: Any = None, mixed: Any = (), **found: Any
) -> dict[str, list[Any]]:
    """The styles of a plan by pattern, with each of these blocks in one stream."""
    net, names = model(depth), tuple(f"blocks.{i}" for i in range(depth))
    regions = {f"{n}.mlp": Region(f"{n}.mlp", Reduction.OF_STREAM, (0,), True) for n in names}
    found = {"streams": {names: 0}, "regions": regions, "on_shards": NORMS, **found}

    def replan(prepare: Any) -> Replanned:
        tracer = FeatureTracer(net, set(), {})
        prepare(tracer)
        for name in names:
            up, x = net["blocks"][int(name[-1])].mlp["up"], torch.ones(2, 4)  # type: ignore[index]
            if inputs == R:
                tracer.put(x, TensorFacts(torch.zeros((), dtype=torch.int64).expand(2, 4), None, True))
            up(x)
        tracer.trace.whole_uses.update(uses or {})
        return Replanned(Plan(rules), tracer.trace, set(mixed))

    workload = Workload(net, lambda m, x: None, None, 2, blocks or RepeatedBlocks())
    plan = shard_streams(workload, rules_by_name(Plan(rules), net), SequencePlan(**found), replan)
    styles: dict[str, list[Any]] = {}
    for rule in plan.rules:
        styles.setdefault(rule.pattern, []).append(rule.style)
    return styles


def test_a_stream_is_gathered_for_a_region_and_its_partial_sums_scattered_where_they_are_made() -> None:
    styles = sharded(reduced_layers={"blocks.0.mlp.down", "blocks.1.mlp.down"})
    assert styles["blocks.0"] == [PrepareInput(arrives=I, wanted=SEQUENCE, arg=0)]
    assert styles["blocks.1"] == [PrepareOutput(arrives=SEQUENCE, wanted=I)]
    for i in range(2):
        assert styles[f"blocks.{i}.mlp"] == [PrepareInput(arrives=SEQUENCE, wanted=R, arg=0)]
        assert styles[f"blocks.{i}.mlp.up"] == [Colwise(input=R)]
        assert styles[f"blocks.{i}.mlp.down"] == [Rowwise(input=WIDTH, output=SEQUENCE)]
        assert styles[f"blocks.{i}.norm"] == [Sequence()]
    assert styles["**"] == [Replicate(state=I)]


def test_a_region_may_reduce_when_it_returns() -> None:
    regions = {f"blocks.{i}.mlp": Region(f"blocks.{i}.mlp", Reduction.AT_RETURN, (0,), True) for i in range(2)}
    styles = sharded(regions=regions, deferred_layers={"blocks.0.mlp.down", "blocks.1.mlp.down"})
    assert styles["blocks.0.mlp"][1:] == [PrepareOutput(arrives=P, wanted=SEQUENCE)]
    assert styles["blocks.0.mlp.down"] == [Rowwise(input=WIDTH, output=P)]


def test_a_column_wise_layer_that_is_a_region_gathers_its_own_input() -> None:
    regions = {f"blocks.{i}.mlp.up": Region(f"blocks.{i}.mlp.up", Reduction.OF_STREAM, (0,)) for i in range(2)}
    styles = sharded(regions=regions)
    assert styles["blocks.0.mlp.up"] == [Colwise(input=SEQUENCE)]  # and no PrepareInput beside


def test_layers_that_do_not_read_the_stream_stay_as_they_are() -> None:
    assert sharded(inputs=I)["blocks.0.mlp.up"] == [Colwise(input=I)]


def test_the_parameters_of_a_module_that_do_not_all_work_on_the_shard_have_a_rule_each() -> None:
    styles = sharded(on_shards={("blocks.0.norm.weight", "blocks.0.norm")})
    assert styles["blocks.0.norm.weight"] == [Sequence()]
    assert "blocks.0.norm" not in styles and "blocks.0.norm.bias" not in styles and "blocks.1.norm" not in styles


def test_copies_have_the_rules_of_their_representative_and_their_own_boundaries() -> None:
    styles = sharded(depth=3, blocks=RepeatedBlocks({"blocks.1": "blocks.0", "blocks.2": "blocks.0"}))
    assert styles["blocks.1.mlp.up"] == [Colwise(input=R)] and styles["blocks.2.norm"] == [Sequence()]
    assert styles["blocks.2"] == [PrepareOutput(arrives=SEQUENCE, wanted=I)] and "blocks.1" not in styles


def test_a_parameter_of_the_stream_may_not_work_on_full_activations() -> None:
    name = "blocks.0.norm.weight"
    with pytest.raises(NotSequenceParallel, match=f"`{name}` works on the stream and on full activations"):
        sharded(uses={name: {"out"}})
    assert sharded(uses={name: {"blocks.0.norm"}})  # in one call, of its own module
    with pytest.raises(NotSequenceParallel, match="works on the stream and on full activations"):
        sharded(uses={name: {"blocks.0.norm"}}, on_full={(name, "blocks.0.norm")})
    assert sharded(
        [*RULES[:-1], Rule("blocks.*.norm.weight", ShardParameter(0, (((0, 2),), ((2, 4),)))), REPLICATE], uses={name: {"out"}}
    )


def reads(place: str) -> Call:
    return Call("size", (("forward", place),), sizes=(((1, 0, -1),),))


def test_code_that_reads_the_length_gets_the_full_one() -> None:
    styles = sharded(length_reads={"blocks.0": [reads("1"), reads("1")]})
    assert RewrittenCalls((reads("1"),)) in styles["blocks.0"]
    adapted = [*RULES[:-1], Rule("blocks.0", RewrittenCalls((reads("2"),))), REPLICATE]
    assert RewrittenCalls((reads("2"), reads("1"))) in sharded(adapted, length_reads={"blocks.0": [reads("1")]})["blocks.0"]
    with pytest.raises(NotSequenceParallel, match="sizes of tokens and of features by one call"):
        sharded(adapted, length_reads={"blocks.0": [reads("2")]})


def test_equal_calls_of_one_place_are_one_and_others_take_turns() -> None:
    other = Call("size", (("forward", "1"),), sizes=(((1, 0, 5),),))
    assert calls_in_turn([reads("1"), reads("2"), reads("1")]) == (reads("1"), reads("2"))
    assert calls_in_turn([reads("1"), reads("2"), other]) == (reads("1"), other, reads("2"))


def test_rules_are_written_out_for_each_module() -> None:
    rules = rules_by_name(Plan(RULES), model())
    assert [r.pattern for r in rules] == [f"blocks.{i}.mlp.{n}" for n in ("up", "down") for i in range(2)]
    assert sharded_names([*rules, Rule("out", Replicate()), Rule("blocks.0", PrepareInput())]) == {r.pattern for r in rules}
