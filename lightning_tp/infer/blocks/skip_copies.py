"""Run a model without the blocks that do the same as their representative: they return what it returned, at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lightning_tp._compat import unobserved
from lightning_tp.infer.blocks.operation_log import OperationLog
from lightning_tp.infer.blocks.repeated import RepeatedBlocks
from lightning_tp.infer.follow.features import shrunk
from lightning_tp.infer.follow.tracer import FeatureTracer, TensorFacts

Known = tuple[Any, TensorFacts]  # a tensor, or another value, and what the tracer knows of it


@dataclass(frozen=True)
class BlockRun:
    """One run of a block: what it was given and what it returned, flattened, and how these were nested."""

    inputs: list[Known]
    input_spec: TreeSpec
    outputs: list[Known]
    output_spec: TreeSpec
    operations: list[Any]  # what it did, where a log is kept


@contextmanager
def skip_copies(
    model: nn.Module, blocks: RepeatedBlocks, tracer: FeatureTracer | None = None, ran: set[str] | None = None
) -> Iterator[None]:
    """Skip blocks whose representative has run with inputs like theirs: they return tensors like its outputs.

    Args:
        model: its blocks' `forward` is replaced inside of `with`.
        blocks: what does the same as what. A block that is given other inputs than its representative was runs itself.
        tracer: knows the features of inputs and outputs. Without it, inputs are compared by shape and dtype only. An operation log writes
            down for a skipped block what its representative did.
        ran: is filled with the names of the blocks that run, representatives among them.
    """
    ran = set() if ran is None else ran
    runs: dict[str, list[BlockRun]] = {}
    replaced: list[tuple[nn.Module, Any]] = []
    for name in {*blocks.copies, *blocks.copies.values()}:
        module = model.get_submodule(name)
        replaced.append((module, module.__dict__.get("forward")))
        runs_alike = runs.setdefault(blocks.copies.get(name, name), [])
        module.__dict__["forward"] = _once(module.forward, name, tracer, runs_alike, ran)
    try:
        yield
    finally:
        for module, forward in replaced:
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


def _once(
    forward: Callable[..., Any], name: str, tracer: FeatureTracer | None, runs: list[BlockRun], ran: set[str]
) -> Callable[..., Any]:
    """Return a forward that repeats the outputs of one of these `runs` if it is given inputs like its, and else runs, and is one of them."""
    log = tracer if isinstance(tracer, OperationLog) else None

    def quick(*args: Any, **kwargs: Any) -> Any:
        given, spec = tree_flatten((args, kwargs))
        with unobserved():
            for run in runs:
                if spec == run.input_spec and _same_inputs(run, given, tracer):
                    if log is not None:
                        log.entries[name] += run.operations
                    return _outputs_like(run, given, tracer)
        inputs = [_known(x, tracer) for x in given]
        ran.add(name)
        mark = len(log.entries[name]) if log is not None else 0
        out = forward(*args, **kwargs)
        outputs, output_spec = tree_flatten(out)
        operations = log.entries[name][mark:] if log is not None else []
        runs.append(BlockRun(inputs, spec, [_known(x, tracer) for x in outputs], output_spec, operations))
        return out

    return quick


def _known(x: Any, tracer: FeatureTracer | None) -> Known:
    return x, tracer.shadow(x) if tracer is not None and isinstance(x, Tensor) else TensorFacts()


def _same_inputs(run: BlockRun, given: list[Any], tracer: FeatureTracer | None) -> bool:
    return len(run.inputs) == len(given) and all(_same(a, _known(x, tracer)) for a, x in zip(run.inputs, given, strict=True))


def _same(a: Known, b: Known) -> bool:
    """Whether a block does the same with one as with the other; values of floats do not matter."""
    (x, x_facts), (y, y_facts) = a, b
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        setting = isinstance(x, (int, str, type(None)))
        return isinstance(x, Tensor) == isinstance(y, Tensor) and not (setting and x != y)
    if x.shape != y.shape or x.dtype != y.dtype or x_facts.grad != y_facts.grad or x_facts.param is not y_facts.param:
        return False
    return _equal_labels(x_facts.label, y_facts.label)


def _equal_labels(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(shrunk(a).squeeze(), shrunk(b).squeeze())


def _outputs_like(run: BlockRun, given: list[Any], tracer: FeatureTracer | None) -> Any:
    """Return new tensors like the outputs of a run; an input that it returned is the one that is `given` now."""
    outputs = []
    for t, facts in run.outputs:
        position = next((i for i, (x, _) in enumerate(run.inputs) if x is t), None)
        if position is not None or not isinstance(t, Tensor):
            outputs.append(t if position is None else given[position])
            continue
        copy = t.detach().clone()
        outputs.append(copy)
        if tracer is not None:
            tracer.put(copy, TensorFacts(_label_now(facts.label, run, given, tracer), None, facts.grad))
            if id(t) in tracer.values:
                tracer.values[id(copy)] = (copy, tracer.values[id(t)][1])
    return tree_unflatten(outputs, run.output_spec)


def _label_now(label: Tensor | None, run: BlockRun, given: list[Any], tracer: FeatureTracer) -> Tensor | None:
    """Return the features of an output: those of the input that it had them from.

    Features that the block itself has made, such as probabilities of its heads, are those of the block that was traced: its weights are
    sharded like this one's.
    """
    if label is None:
        return None
    source = next(
        (i for i, (x, known) in enumerate(run.inputs) if isinstance(x, Tensor) and _equal_labels(known.label, label)), None
    )
    return label if source is None else tracer.shadow(given[source]).label
