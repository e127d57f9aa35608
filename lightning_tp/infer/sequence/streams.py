"""Where the residual stream of repeated blocks may lie in shards of the sequence: sequence parallelism, inferred.

From the first block to the last, what is neither inside an attention nor inside an MLP (norms, dropout, residual sums) is to run on this
rank's tokens. The blocks are run once more with a label on each token: that has to come out of every operation between the split regions
unmixed, without a size or an operand that would have to change. A region (a module that takes the stream whole) is entered by an
all-gather, and what the ranks' terms of its result add up to is left by a reduce-scatter, as in Megatron-LM: where the layer that
makes them stands, or, where code goes on with it that can as well run on terms, when the region returns. A region whose code allows neither
is opened, and the modules in it are regions. Inside, code sees the whole stream and has a share of its gradient; so the features are
followed once more, from the doors of the regions on. Where the code does not allow just that, or more would be gathered than is summed, the
stream stays whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from lightning_tp.core.modules.blocks import find_blocks, starred
from lightning_tp.infer.repeats import Alike
from lightning_tp.infer.sequence.doors import Replan, _expanded, _with_cuts
from lightning_tp.infer.sequence.stream import STEPS, NotSequenceParallel, SequencePlan, _Choices, _Region
from lightning_tp.infer.sequence.tokens import _cut
from lightning_tp.plan.plan import Plan
from lightning_tp.plan.rule import Rule
from lightning_tp.styles import Replicate

MOST_RUNS = 12  # of the model, for one stream


def with_sequence_parallel(
    model: nn.Module,
    call: Callable[[nn.Module, Any], Any],
    inputs: Any,
    plan: Plan,
    tp: int,
    replan: Replan,
    once: Any = None,
    alike: Alike | None = None,
) -> Plan:
    """The plan, with the streams of repeated blocks in shards of the sequence where the code allows it.

    `replan(doors)` follows the features once more, where `doors(tracer)` puts labels on what the regions are given. Blocks that are `alike`
    an earlier one are not followed, while `once(tracer)` is entered (see `repeats.py`): they are ruled as that one is.
    """
    alike = alike or {}
    rules = _expanded(plan, model)
    cuts: list[SequencePlan] = []
    for blocks in _streams(model, rules):
        if any(b in of.blocks for of in cuts for b in blocks):
            continue
        found = _try(model, call, inputs, rules, blocks, tp, cuts, replan, once, alike)
        if found is not None:
            plan_in_shards, cuts = found
    return plan_in_shards if cuts else plan


def _try(
    model: nn.Module,
    call: Callable[[nn.Module, Any], Any],
    inputs: Any,
    rules: list[Rule],
    blocks: list[str],
    tp: int,
    cuts: list[SequencePlan],
    replan: Replan,
    once: Any,
    alike: Alike,
) -> tuple[Plan, list[SequencePlan]] | None:
    """The plan with one more stream in shards; None if it has to stay whole."""
    choices = _Choices()
    steps = choices.steps
    regions: dict[str, _Region] = {}
    for _ in range(MOST_RUNS):
        try:
            regions = {r.name: r for b in blocks for r in _regions(model, rules, b, steps)}
            cut = _cut(model, call, inputs, rules, blocks, tp, regions, choices, once)
            return _with_cuts(model, rules, [*cuts, cut], replan, alike), [*cuts, cut]
        except NotSequenceParallel as no:
            if not (no.otherwise.kept <= choices.kept and no.otherwise.reads <= choices.reads):
                choices.kept |= no.otherwise.kept
                choices.reads |= no.otherwise.reads
                continue
            around = {r for m in no.modules for r in regions if m == r or m.startswith(f"{r}.")}
            names = {starred(r) for r in around if steps.get(starred(r), 0) < 3}
            if not names:
                return None
            wider = {starred(r) for r in around if regions[r].wider}
            for name in names:
                steps[name] = steps.get(name, 0) + 1
                if STEPS[steps[name]] == "sums" and name not in wider:
                    steps[name] += 1
    return None


def _streams(model: nn.Module, rules: list[Rule]) -> Iterator[list[str]]:
    """The names of blocks that may follow each other: what one container holds; then those that are alike."""
    split = [r.pattern for r in rules if r.style.splits_parameters and not isinstance(r.style, Replicate)]

    def walk(module: nn.Module, prefix: str) -> Iterator[list[str]]:
        names = [f"{prefix}{n}" for n, _ in module.named_children()]
        holds = [any(s.startswith(f"{n}.") for s in split) and n not in split for n in names]
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) and any(holds):
            yield names
            return
        for name, child in module.named_children():
            yield from walk(child, f"{prefix}{name}.")

    yield from walk(model, "")
    by_holder: dict[str, list[str]] = {}
    for name, _ in find_blocks(model):
        by_holder.setdefault(name.rpartition(".")[0], []).append(name)
    yield from by_holder.values()


def _regions(model: nn.Module, rules: list[Rule], block: str, steps: dict[str, int]) -> Iterator[_Region]:
    """The topmost modules below a block that hold split layers, but for those that are opened."""
    split = {
        r.pattern
        for r in rules
        if r.pattern.startswith(f"{block}.") and r.style.splits_parameters and not isinstance(r.style, Replicate)
    }

    def walk(name: str) -> Iterator[_Region]:
        for child, m in model.get_submodule(name).named_children():
            where = f"{name}.{child}"
            if not any(n == where or n.startswith(f"{where}.") for n in split):
                continue
            step = steps.get(starred(where), 0)
            if isinstance(m, (nn.ModuleList, nn.ModuleDict)) or (step == 3 and where not in split):
                yield from walk(where)
            else:
                yield _Region(where, STEPS[min(step, 2)])

    yield from walk(block)
