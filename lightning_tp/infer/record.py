"""Run a model once more, with a rank for each feature, and see which calls in its code have to change on a rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_tp.infer.assign import Assignment, made_by_weight
from lightning_tp.infer.blocks.workload import Workload
from lightning_tp.infer.calls.local_sizes import PerRankInt
from lightning_tp.infer.calls.recorder import CallChanges, CallRecorder
from lightning_tp.infer.follow.trace import FeatureTrace
from lightning_tp.infer.follow.tracer import FeatureTracer


@dataclass(frozen=True)
class Recording:
    """What a run with a rank for each feature has shown."""

    changes: CallChanges  # the calls that change, and those that can't
    trace: FeatureTrace  # here a parameter meets sharded activations only where ranks do have different elements of them
    outputs: tuple[Tensor, ...]  # the features of what the model returned


def record_calls(workload: Workload, assignment: Assignment, prepare: Callable[[FeatureTracer], None] | None = None) -> Recording:
    """Record the calls of one run. It is repeated as long as code is found to compute with the size of a shard, which it then reads in full.

    Args:
        prepare: is given the tracer before the run, to put features where there would be none.
    """
    full_size_reads: set[Any] = set()
    recorders: list[CallRecorder] = []

    def recorder_of(tracer: FeatureTracer) -> CallRecorder:
        recorders.append(_recorder(workload, assignment, tracer, full_size_reads))
        if prepare is not None:
            prepare(tracer)
        return recorders[-1]

    whole, shared = set(assignment.whole), dict(assignment.shared)
    while True:
        run = workload.trace(whole, shared, recorder_of)
        recorder = recorders[-1]
        computed_with = PerRankInt.diverging - full_size_reads
        computed_with = computed_with or workload.untracked_reads(whole, shared, recorder_of, recorder, run.tracer)
        if not computed_with:
            return Recording(recorder.found, run.trace, run.outputs)
        full_size_reads |= computed_with


def _recorder(workload: Workload, assignment: Assignment, tracer: FeatureTracer, full_size_reads: set[Any]) -> CallRecorder:
    trace, logits = assignment.trace, assignment.logits
    shown_owner = assignment.owner.clone()
    for (name, _), nodes in trace.nodes.items():
        if name in logits:
            shown_owner[nodes] = -1  # logits show their full shape, and take care of themselves
    tracer.owner = shown_owner
    tracer.known = {(u.name, u.dim, u.kind) for u in trace.uses}
    by_call = {name: vocabulary for name, vocabulary in logits.items() if name not in assignment.layers}
    layers = set(assignment.layers.values())
    recorder = CallRecorder(tracer, shown_owner, workload.tp, layers, by_call, trace.nodes, full_size_reads)
    recorder.layouts.param_owner = assignment.owner
    recorder.layouts.biases = _biases(workload.model, assignment)
    recorder.tables = {n for n, m in workload.model.named_modules() if isinstance(m, nn.Embedding)}
    recorder.split = recorder.layouts.weight_of = _split_parameters(workload, assignment)
    recorder.tried = trace.tried
    recorder.mixed = assignment.mixed
    recorder.outside = set(trace.whole_uses) - set(trace.local_uses)
    return recorder


def _split_parameters(workload: Workload, assignment: Assignment) -> dict[str, str]:
    """Return each parameter that is split, in copies of a traced block too -> the weight with its features: itself, or that of its layer."""
    model, trace = workload.model, assignment.trace
    names, makers = {id(p): n for n, p in model.named_parameters()}, {n for n, _ in made_by_weight(trace)}
    split = {n: n for n, _ in trace.nodes}
    for weight, layer in assignment.layers.items():
        bias = getattr(model.get_submodule(layer), "bias", None)
        if weight in makers and bias is not None:
            split[names[id(bias)]] = weight
    first = {n: workload.blocks.representative(n) for n in names.values()}
    return {n: split[f] for n, f in first.items() if f in split}


def _biases(model: nn.Module, assignment: Assignment) -> dict[str, Tensor]:
    """Return the biases of column-wise layers, and the features of the layers' outputs."""
    outs = made_by_weight(assignment.trace)
    names = {id(p): n for n, p in model.named_parameters()}
    found = {}
    for weight, layer in assignment.layers.items():
        bias = getattr(model.get_submodule(layer), "bias", None)
        nodes = next((nodes for (n, d), nodes in assignment.trace.nodes.items() if n == weight and (n, d) in outs), None)
        if bias is not None and nodes is not None:
            found[names[id(bias)]] = nodes
    return found
