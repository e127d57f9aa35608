"""Write the rules of a plan in which streams are sharded along the sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_tp.core.comm.state import SEQUENCE, I, P, R, State
from lightning_tp.core.modules.blocks import enclosing
from lightning_tp.infer.blocks.workload import Workload
from lightning_tp.infer.sequence.boundaries import Inputs, Replan, Replanned, replan_from_boundaries
from lightning_tp.infer.sequence.sequence_plan import NotSequenceParallel, Region, SequencePlan
from lightning_tp.plan.plan import Plan
from lightning_tp.plan.rule import CATCH_ALL, Rule
from lightning_tp.styles import Colwise, PrepareInput, PrepareOutput, Replicate, RewrittenCalls, Rowwise, Sequence
from lightning_tp.styles.calls.call import Call


def rules_by_name(plan: Plan, model: nn.Module) -> list[Rule]:
    """Return one rule for each module or parameter that a rule of the plan matches, without the catch-all."""
    names = [n for n, _ in model.named_modules(remove_duplicate=False)]
    names += [n for n, _ in model.named_parameters(remove_duplicate=False)]
    exactly, rules = set(names), [r for r in plan.rules if r.pattern != CATCH_ALL]
    return [Rule(n, r.style, r.reason) for r in rules for n in ([r.pattern] if r.pattern in exactly else names) if r.matches(n)]


def sharded_names(rules: Iterable[Rule]) -> set[str]:
    """Return the modules and parameters that these rules shard."""
    return {r.pattern for r in rules if r.style.splits_parameters and not isinstance(r.style, Replicate)}


def shard_streams(workload: Workload, rules: list[Rule], sequence: SequencePlan, replan: Replan) -> Plan:
    """Return the plan with streams sharded along the sequence.

    Args:
        rules: of the plan without, one for each module.
        sequence: the streams, and what was found when their tokens were followed.
        replan: follows the features once more; see `replan_from_boundaries`.

    Raises:
        NotSequenceParallel: if the code does not allow it.
    """
    model, blocks = workload.model, workload.blocks
    found, inputs = replan_from_boundaries(model, rules, sequence, replan)
    traced = [r for r in rules_by_name(found.plan, model) if blocks.representative(r.pattern) == r.pattern]
    new = []
    for r in traced:
        in_stream = _IN_STREAM.get(type(r.style))
        new.append(Rule(r.pattern, in_stream(r.pattern, r.style, sequence, inputs), r.reason) if in_stream else r)
    adapted = {r.pattern for r in new if isinstance(r.style, RewrittenCalls)}
    for module, calls in sequence.length_reads.items():
        if module not in adapted:
            new.append(
                Rule(module, RewrittenCalls(calls_in_turn(calls)), "code that reads the sequence length gets the full length")
            )
    new += _boundary_rules(sequence, inputs)
    _check_parameters(new, sequence, found)
    new += _on_shards(model, new, sequence)
    own = [
        r for r in new if r.pattern in blocks.copies or blocks.representative(r.pattern) == r.pattern
    ]  # a block's boundaries, too
    return Plan([*blocks.expand_to_copies(own), *(r for r in found.plan.rules if r.pattern == CATCH_ALL)], found.plan.source)


def calls_in_turn(calls: Iterable[Call]) -> tuple[Call, ...]:
    """Group calls by their place in the code, in turn; one of those of a place stands for all if they are equal."""
    by_place: dict[Any, list[Call]] = {}
    for c in calls:
        by_place.setdefault((c.name, c.at), []).append(c)
    return tuple(c for group in by_place.values() for c in (group[:1] if all(c == group[0] for c in group) else group))


def _column_wise(name: str, style: Colwise, sequence: SequencePlan, inputs: Inputs) -> Colwise:
    states = inputs.get(name, {I})
    if states == {I}:
        return style
    if states != {R}:
        raise NotSequenceParallel(f"`{name}` reads the stream and full activations", {name})
    region = sequence.regions.get(name)
    return replace(style, input=SEQUENCE if region is not None and _gathers_itself(region, inputs) else R)


def _row_wise(name: str, style: Rowwise, sequence: SequencePlan, inputs: Inputs) -> Rowwise:
    if name in sequence.reduced_layers:
        return replace(style, output=SEQUENCE)
    return replace(style, output=P) if name in sequence.deferred_layers else style


def _local_ops(name: str, style: RewrittenCalls, sequence: SequencePlan, inputs: Inputs) -> RewrittenCalls:
    reads = calls_in_turn(sequence.length_reads.get(name, ()))
    deferred = enclosing(name, {r.name for r in sequence.regions.values() if r.reduces_at_return})

    def to(call: Call) -> State:
        return SEQUENCE if (name, call.name, call.at) in sequence.reduced_calls else P if deferred else I

    if {(c.name, c.at) for c in style.calls} & {(c.name, c.at) for c in reads}:
        raise NotSequenceParallel(f"`{name}` reads sizes of tokens and of features by one call", {name})
    return replace(style, calls=(*(replace(c, to=to(c)) if c.leave else c for c in style.calls), *reads))


_IN_STREAM: dict[type, Callable[[str, Any, SequencePlan, Inputs], Any]] = {
    Colwise: _column_wise,
    Rowwise: _row_wise,
    RewrittenCalls: _local_ops,
}


def _gathers_itself(region: Region, inputs: Inputs) -> bool:
    """Whether a region is one column-wise layer, which all-gathers its input."""
    return inputs.get(region.name) == {R} and len(region.args or ()) == 1


def _boundary_rules(sequence: SequencePlan, inputs: Inputs) -> Iterator[Rule]:
    """What crosses the ranks at the boundaries of a stream and of its regions."""
    for blocks, entry in sequence.streams.items():
        into = PrepareInput(arrives=I, wanted=SEQUENCE, arg=entry)
        yield Rule(blocks[0], into, "residual stream sharded along the sequence dimension from here")
        for region in (r for r in sequence.regions.values() if enclosing(r.name, blocks)):
            for arg in () if _gathers_itself(region, inputs) else region.args or ():
                into = PrepareInput(arrives=SEQUENCE, wanted=R, arg=arg)
                yield Rule(region.name, into, "all-gathered once for all layers inside")
            if region.reduces_at_return:
                out = PrepareOutput(arrives=P, wanted=SEQUENCE)
                yield Rule(region.name, out, "partial sums reduce-scattered once for all layers inside")
        out = PrepareOutput(arrives=SEQUENCE, wanted=I)
        yield Rule(blocks[-1], out, "residual stream all-gathered to the full sequence here")


def _check_parameters(rules: list[Rule], sequence: SequencePlan, found: Replanned) -> None:
    """Refuse a replicated parameter that works on the sequence shard and on full activations: its gradient would be neither."""
    sharded = sharded_names(rules)
    for name in {**{n: None for n, _ in sequence.on_shards}, **found.trace.local_uses}:
        on_shards = {module for n, module in sequence.on_shards if n == name}
        full = found.trace.whole_uses.get(name, set())
        also_full = (full - on_shards) | {m for m in full & on_shards if (name, m) in sequence.on_full}
        if also_full and (on_shards or name not in found.mixed) and not enclosing(name, sharded):
            raise NotSequenceParallel(f"`{name}` works on the stream and on full activations", on_shards)


def _on_shards(model: nn.Module, rules: list[Rule], sequence: SequencePlan) -> Iterator[Rule]:
    """Parameters that work on the sequence shard: their gradient is a part of the sum. One rule for a module of which all do."""
    covered = [r.pattern for r in rules if r.style.splits_parameters]
    on_shards = {n for n, _ in sequence.on_shards}
    for block in [block for blocks in sequence.streams for block in blocks]:
        inside = [n for n, _ in model.get_submodule(block).named_parameters(prefix=block)]
        names = [n for n in inside if n in on_shards and not enclosing(n, covered)]
        for owner in dict.fromkeys(n.rpartition(".")[0] for n in names):
            together = owner != block and {n for n in inside if n.startswith(f"{owner}.")} <= set(names)
            for n in [owner] if together else [n for n in names if n.rpartition(".")[0] == owner]:
                yield Rule(n, Sequence(), "runs on the local sequence shard")
