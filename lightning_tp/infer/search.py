"""From traces to a plan: which weights are split, which rank has which feature, what else has to change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_tp.core.comm.state import I
from lightning_tp.core.modules.blocks import starred
from lightning_tp.core.modules.snapshot import MetaWeights, gc_disabled, has_more_than, preserve_buffers_and_rng, preserve_modules
from lightning_tp.core.ops.attention import readable_attention
from lightning_tp.errors import TPError
from lightning_tp.infer.assign import (
    MOST_SHARES,
    TABLE,
    Key,
    _broken,
    _demote,
    _escaped,
    _heads,
    _inside,
    _owners,
    _share,
    _standard,
    _too_few,
)
from lightning_tp.infer.calls.local_sizes import PerRankInt
from lightning_tp.infer.calls.recorder import CallChanges, CallRecorder, untracked_size_reads
from lightning_tp.infer.dry_run import dry_run
from lightning_tp.infer.follow.features import shrunk
from lightning_tp.infer.follow.run import leaves, run
from lightning_tp.infer.follow.trace import FeatureTrace
from lightning_tp.infer.repeats import Alike, alike_blocks, blocks_once, followed
from lightning_tp.infer.rules import _explained, _folded, _plan
from lightning_tp.infer.sequence.stream import NotSequenceParallel
from lightning_tp.infer.sequence.streams import with_sequence_parallel
from lightning_tp.plan.plan import Plan
from lightning_tp.plan.rule import Rule
from lightning_tp.styles import Colwise

MOST_REAL = 5_000_000  # parameters, above which a model is followed without computing


MOST_RUNS = 24


Caller = Callable[[nn.Module, Any], Any]


def infer_plan(model: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...], tp: int) -> Plan:
    """Find how a model splits over `tp` ranks by running it, whatever its modules are called.

    Nothing is changed and nothing is sent: the forward runs in this process, on the model's own weights or on the meta device, and every
    feature of every weight is followed to where it is used.

    Args:
        model: any transformer; unsplit.
        inputs: what its forward is called with: a mapping of keyword arguments, or a tuple.
        tp: the number of ranks that share it.

    Returns:
        The plan, not yet checked against the model (`parallelize` does it).

    Raises:
        TPError: if the model can't be run, or nothing in it can be split.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> {rule.pattern: rule.style.name for rule in infer_plan(mlp, (torch.zeros(2, 4, 8),), tp=2).rules}
        {'0': 'colwise', '2': 'rowwise', '**': 'replicate'}
    """
    return infer_by_call(model, call_with, dict(inputs) if isinstance(inputs, Mapping) else tuple(inputs), tp)


def call_with(model: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...]) -> Any:
    """The model's output for keyword or positional arguments."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def infer_by_call(model: nn.Module, call: Caller, inputs: Any, tp: int) -> Plan:
    """As `infer_plan`, for a model that runs by `call(model, inputs)`: a training step, for instance.

    Raises:
        TPError: as `infer_plan`.
    """
    if tp < 1:
        raise TPError(f"`tp={tp}`: the number of ranks that share one model is 1 or more.")
    with preserve_buffers_and_rng(model), gc_disabled():
        if has_more_than(model, MOST_REAL):
            try:
                with MetaWeights(model) as twin:
                    return _infer(model, call, inputs, tp, twin.weights)
            except Exception:  # it decides by values, it may be: follow it on real ones
                pass
        try:
            return _infer(model, call, inputs, tp, nullcontext)
        except TPError:
            raise
        except Exception as error:
            raise TPError(
                f"Following the forward of {type(model).__name__} to find a plan ended with {type(error).__name__}: {error}. See that it runs "
                "on these inputs in one process, or give a plan (`plan=`)."
            ) from error


def _infer(model: nn.Module, call: Caller, inputs: Any, tp: int, weights: Any) -> Plan:
    with preserve_modules(model):
        alike = alike_blocks(model, call, inputs)
    try:
        return _found(model, call, inputs, tp, weights, alike)
    except Exception:
        if not alike:
            raise
    return _found(model, call, inputs, tp, weights, {})  # code around the blocks looks for what only each of them makes


def _found(model: nn.Module, call: Caller, inputs: Any, tp: int, weights: Any, alike: Alike) -> Plan:
    """The plan, from runs of the model as it stands; `weights()` is a context in which it has its weights, to try the plan."""

    ran: set[str] = set()

    def once(tracer: Any) -> Any:
        ran.clear()
        return blocks_once(model, tracer, alike, ran)

    names = {n: p for n, p in model.named_parameters()}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    whole: dict[Key, str] = {(n, 1): TABLE for n, p in names.items() if id(p) in tables}
    shared: dict[Key, Tensor] = {}
    names_stars = {starred(n) for n in names}
    tries: dict[str, int] = {}
    ungathered: set[str] = set()
    convolved: set[str] = set()
    for turn in range(MOST_RUNS + 1):
        if (
            turn == MOST_RUNS // 2
        ):  # a chain of convolutions and batch norms is given up one by one: not the rest of the model for it
            late = "whether its channels stay apart was not found in time"
            whole.update({(n, d): late for n in convolved for d in range(names[n].ndim)})
        if turn == MOST_RUNS:  # what is left is whole, and right
            whole.update({(n, d): "how its features are used could not be told" for n, p in names.items() for d in range(p.ndim)})
            shared = {}
        with readable_attention(model), preserve_modules(model):
            trace, out, tracer = run(model, call, inputs, set(whole), shared, during=once)
        convolved |= trace.convolved
        alike = {name: like for name, like in alike.items() if name not in ran}  # given other inputs, after all: to be followed
        escaped = _escaped(trace, out, tracer)
        if escaped and shared:
            shared, tries = {}, dict.fromkeys(names_stars, MOST_SHARES)
            continue
        bad = {k: "what every rank has of it meets what is whole" for k in trace.nodes} if escaped else _too_few(trace, tp, names)
        if bad and not escaped and _share(bad, trace, shared, names, tries):
            continue
        if bad:
            _demote(bad, whole, names, trace)
            continue
        owner = _owners(trace, tp)
        heads = _heads(model, trace, owner, out, tracer, tp)
        standard = _standard(model, trace, names)
        with readable_attention(model):
            found, sinks = _record(model, call, inputs, trace, set(whole), shared, owner, tp, standard, heads, once)
        bad = _broken(found, trace, owner, sinks, heads, tp)
        if not bad:
            plan = _plan(model, trace, owner, found, heads, standard, whole, tp, ungathered, alike)
            with readable_attention(model), preserve_modules(model):
                replan = partial(
                    _from_doors,
                    model,
                    call,
                    inputs,
                    trace,
                    whole,
                    shared,
                    owner,
                    tp,
                    standard,
                    heads,
                    ungathered,
                    plan,
                    once,
                    alike,
                )
                final = _with_sequence(model, call, inputs, plan, tp, replan, once, alike)
            with weights():
                failed = dry_run(model, call, inputs, final, tp, alike)
                if failed is not None and final != plan:
                    final, failed = plan, dry_run(model, call, inputs, plan, tp, alike)
            if failed is None or turn == MOST_RUNS or (not trace.nodes and "" in ungathered):
                return _explained(final, whole, names)
            ungathered.add(starred(failed[0]) if trace.nodes else "")
            bad = _inside(followed(failed[0], alike), failed[1], trace)
        _demote(bad, whole, names, trace)
    raise TPError(
        f"No plan for {type(model).__name__} was found in {MOST_RUNS} runs; the last weights that were given up: "
        f"{', '.join(n for n, _ in list(whole)[-3:])}. Give a plan (`plan=`)."
    )


def _record(
    model: nn.Module,
    call: Caller,
    inputs: Any,
    trace: FeatureTrace,
    whole: set[Key],
    shared: dict[Key, Tensor],
    owner: Tensor,
    tp: int,
    standard: dict[str, str],
    heads: dict[str, int],
    once: Any,
    doors: Any = None,
) -> tuple[CallChanges, list[Tensor]]:
    recorders: list[CallRecorder] = []
    whole_reads: set[Any] = set()

    owners, owner = owner, owner.clone()
    tables = {n for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    for (name, _), nodes in trace.nodes.items():
        if name in heads:
            owner[nodes] = -1  # logits show their whole shape, and take care of themselves

    def make(tracer: Any) -> CallRecorder:
        by_call = {n: v for n, v in heads.items() if n not in standard}
        tracer.owner = owner
        tracer.known = {(u.name, u.dim, u.kind) for u in trace.uses}
        recorders.append(CallRecorder(tracer, owner, tp, set(standard.values()), by_call, trace.nodes, whole_reads))
        recorders[-1].layouts.param_owner, recorders[-1].tables, recorders[-1].tried = owners, tables, trace.tried
        recorders[-1].mixed = recorders[-1].found.mixed = set(trace.local_uses) & set(trace.whole_uses)
        recorders[-1].outside = set(trace.whole_uses) - set(trace.local_uses)
        if doors is not None:
            doors(tracer)
        return recorders[-1]

    while True:
        with preserve_modules(model):
            _, out, tracer = run(model, call, inputs, whole, shared, make, during=once)
        recorder = recorders[-1]
        if PerRankInt.diverging - whole_reads:
            whole_reads |= PerRankInt.diverging
        elif unseen := untracked_size_reads(model, call, inputs, whole, shared, make, once, recorder, tracer):
            whole_reads |= unseen
        else:
            break
    outputs = [tracer.shadow(t).label for t in leaves(out)]
    recorder.found.local_uses, recorder.found.trace = tracer.trace.local_uses, tracer.trace
    return recorder.found, [x for x in outputs if x is not None]


def _from_doors(
    model: nn.Module,
    call: Caller,
    inputs: Any,
    trace: FeatureTrace,
    whole: dict[Key, str],
    shared: dict[Key, Tensor],
    owner: Tensor,
    tp: int,
    standard: dict[str, str],
    heads: dict[str, int],
    ungathered: set[str],
    plan: Plan,
    once: Any,
    alike: Alike,
    doors: Callable[[Any], None],
) -> tuple[Plan, CallChanges]:
    """The plan as it is where some modules are given a stream of which each rank has a share of the gradient; see `sequence.py`."""
    found, sinks = _record(model, call, inputs, trace, set(whole), shared, owner, tp, standard, heads, once, doors)
    assert found.trace is not None
    for (weight, _), why in _broken(found, trace, owner, sinks, heads, tp).items():
        raise NotSequenceParallel(f"{weight}: {why}", {weight.rpartition(".")[0]})
    if any(not bool(shrunk(x).any()) for x in sinks):
        raise NotSequenceParallel("a share of a gradient leaves the model")
    gathers = {r.pattern for r in plan.rules if isinstance(r.style, Colwise) and r.style.output == I}
    for where in [n for n, _ in model.named_modules() if any(Rule(g, "colwise").matches(n) for g in gathers)]:
        for name, _ in model.get_submodule(where).named_parameters(prefix=where):  # its output is whole again, whatever it reads
            for uses in (found.trace.local_uses, found.trace.whole_uses):
                uses.pop(name, None)
            found.trace.whole_uses.update({name: trace.whole_uses[name]} if name in trace.whole_uses else {})
    seen = replace(trace, local_uses=found.trace.local_uses, whole_uses=found.trace.whole_uses)
    return _plan(model, seen, owner, found, heads, standard, whole, tp, ungathered, alike), found


def _with_sequence(model: nn.Module, call: Caller, inputs: Any, plan: Plan, tp: int, replan: Any, once: Any, alike: Alike) -> Plan:
    rules = with_sequence_parallel(model, call, inputs, plan, tp, replan, once, alike).rules if tp > 1 else plan.rules
    everything = [n for n, _ in model.named_modules()] + list(dict(model.named_parameters(remove_duplicate=False)))
    catch_all = [r for r in rules if r.pattern == "**"]
    return Plan([*_folded([r for r in rules if r.pattern != "**"], everything), *catch_all], plan.source)
