"""Sequence parallelism, inferred: find the streams of repeated blocks that can be sharded along the sequence.

From the first block to the last, what is neither inside an attention nor inside an MLP (norms, dropout, residual sums) is to run on the
local sequence shard. The blocks are run once more with a label on each token: it has to come out of every operation between the sharded
regions unmixed, without a size or an operand that would have to change (`follow_tokens.py`). A region, a module that takes the full sequence,
is entered by an all-gather; its partial sums are reduce-scattered, as in Megatron-LM: where the layer that makes them stands or, where code
goes on with them that can as well run on partial sums, when the region returns. A region whose code allows neither is opened, and the
modules in it are regions. Inside, code has the full stream and a part of its gradient; so the features are followed once more, from the
boundaries of the regions on (`boundaries.py`). Where the code does not allow just that, or more would be all-gathered than is reduced, the
stream is replicated.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from torch import nn

from lightning_tp.core.modules.blocks import enclosing, find_blocks, starred
from lightning_tp.infer.blocks.workload import Workload
from lightning_tp.infer.sequence.boundaries import Replan
from lightning_tp.infer.sequence.follow_tokens import follow_tokens
from lightning_tp.infer.sequence.rules import rules_by_name, shard_streams, sharded_names
from lightning_tp.infer.sequence.sequence_plan import Alternatives, NotSequenceParallel, Reduction, Region, SequencePlan
from lightning_tp.plan.plan import Plan
from lightning_tp.plan.rule import Rule

MOST_ATTEMPTS = 12  # for one stream


def with_sequence_parallel(workload: Workload, plan: Plan, replan: Replan) -> Plan:
    """Return the plan with the streams of repeated blocks sharded along the sequence, where the code allows it.

    Args:
        replan: follows the features once more; see `boundaries.replan_from_boundaries`.
    """
    rules = rules_by_name(plan, workload.model)
    sharded = SequencePlan()
    for blocks in _candidates(workload.model, rules):
        if not {b for earlier in sharded.streams for b in earlier} & set(blocks):
            plan, sharded = _try_stream(workload, rules, blocks, sharded, replan) or (plan, sharded)
    return plan


def _try_stream(
    workload: Workload, rules: list[Rule], blocks: tuple[str, ...], earlier: SequencePlan, replan: Replan
) -> tuple[Plan, SequencePlan] | None:
    """Return the plan with one more stream sharded, and what that takes; None if the stream has to be replicated."""
    alternatives = Alternatives()
    for _ in range(MOST_ATTEMPTS):
        regions = [r for block in blocks for r in _regions(workload.model, rules, block, alternatives.reductions)]
        sequence = SequencePlan()
        try:
            sequence = follow_tokens(workload, rules, blocks, regions, alternatives)
            return shard_streams(workload, rules, earlier | sequence, replan), earlier | sequence
        except NotSequenceParallel as refusal:
            other_width = refusal.other_width | {r.name for r in sequence.regions.values() if r.other_width}
            following = _next_alternatives(alternatives, refusal, [r.name for r in regions], other_width)
            if following is None:
                break
            alternatives = following
    return None


def _next_alternatives(
    tried: Alternatives, refusal: NotSequenceParallel, regions: Collection[str], other_width: frozenset[str]
) -> Alternatives | None:
    """Return what to try after a refusal: other arguments or sizes, else another reduction for the regions around; None if there is none."""
    other = refusal.alternatives
    args, reads = tried.sharded_args | other.sharded_args, tried.full_size_reads | other.full_size_reads
    if (args, reads) != (tried.sharded_args, tried.full_size_reads):
        return replace(tried, sharded_args=args, full_size_reads=reads)
    around = {r for m in refusal.modules for r in regions if enclosing(m, {r})}
    wide = {starred(r) for r in around & other_width}
    following: dict[str, Reduction] = {}
    for name in {starred(r) for r in around}:
        reduction = tried.reductions.get(name, Reduction.OF_STREAM)
        if reduction is not Reduction.OPENED:
            step = 2 if reduction is Reduction.OF_STREAM and name not in wide else 1
            following[name] = Reduction(reduction + step)
    return replace(tried, reductions={**tried.reductions, **following}) if following else None


def _candidates(model: nn.Module, rules: list[Rule]) -> Iterator[tuple[str, ...]]:
    """Yield the names of blocks that may follow each other: what one container holds; then repeated blocks of one container."""
    sharded = sharded_names(rules)

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, ...]]:
        names = [f"{prefix}{n}" for n, _ in module.named_children()]
        holds_layers = [any(s.startswith(f"{n}.") for s in sharded) and n not in sharded for n in names]
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) and any(holds_layers):
            yield tuple(names)
            return
        for name, child in module.named_children():
            yield from walk(child, f"{prefix}{name}.")

    yield from walk(model, "")
    by_container: dict[str, list[str]] = {}
    for name, _ in find_blocks(model):
        by_container.setdefault(name.rpartition(".")[0], []).append(name)
    yield from map(tuple, by_container.values())


def _regions(model: nn.Module, rules: list[Rule], block: str, reductions: Mapping[str, Reduction]) -> Iterator[Region]:
    """Yield the topmost modules below a block that hold sharded layers, but for those that are opened."""
    sharded = sharded_names(rules)

    def walk(name: str) -> Iterator[Region]:
        for child, module in model.get_submodule(name).named_children():
            where = f"{name}.{child}"
            if not any(enclosing(n, {where}) for n in sharded):
                continue
            reduction = reductions.get(starred(where), Reduction.OF_STREAM)
            opened = reduction is Reduction.OPENED and where not in sharded
            if opened or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                yield from walk(where)
            else:
                yield Region(where, min(reduction, Reduction.AT_RETURN))

    yield from walk(block)
