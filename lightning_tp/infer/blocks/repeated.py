"""Blocks that do the same as an earlier one: what follows for names and rules, and runs of a model that skip them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lightning_tp._compat import unobserved
from lightning_tp.core.modules.blocks import copies_of_first, enclosing
from lightning_tp.core.modules.snapshot import preserve_modules
from lightning_tp.infer.blocks.operation_log import OperationLog
from lightning_tp.infer.follow.features import shrunk
from lightning_tp.infer.follow.trace import TensorFacts
from lightning_tp.infer.follow.tracer import FeatureTracer
from lightning_tp.plan.rule import Rule
from lightning_tp.styles import PrepareInput, PrepareOutput

Known = tuple[Any, TensorFacts]  # a tensor, or another value, and what the tracer knows of it


@dataclass(frozen=True)
class RepeatedBlocks:
    """Blocks that do the same as an earlier one, their representative, which is traced in their place.

    Args:
        copies: name of a block -> name of its representative. Representatives themselves are not in it.
    """

    copies: Mapping[str, str] = field(default_factory=dict)

    def representative(self, name: str) -> str:
        """Return the name of the same module or parameter in the block that is traced in place of this one's."""
        block = enclosing(name, self.copies)
        return self.copies[block] + name[len(block) :] if block else name

    def expand_to_copies(self, rules: list[Rule]) -> list[Rule]:
        """Return the rules, and the same for the copies of traced blocks; but a block keeps what prepares its own input or output."""
        expanded = list(rules)
        for block, traced in self.copies.items():
            for rule in rules:
                at_boundary = rule.pattern == traced and isinstance(rule.style, (PrepareInput, PrepareOutput))
                if enclosing(rule.pattern, {traced}) and not at_boundary:
                    expanded.append(Rule(block + rule.pattern[len(traced) :], rule.style, rule.reason))
        return expanded

    def without(self, names: Iterable[str]) -> RepeatedBlocks:
        """Return the same, where these blocks are no copies: they are to be traced themselves."""
        traced = set(names)
        return RepeatedBlocks({block: first for block, first in self.copies.items() if block not in traced})

    def refined(self, kinds: Mapping[str, Hashable]) -> RepeatedBlocks:
        """Return the same, where copies have to be of one kind, too; blocks that are not in `kinds` stand alone."""
        blocks = [*dict.fromkeys(self.copies.values()), *self.copies]
        return RepeatedBlocks(copies_of_first({b: (self.copies.get(b, b), kinds[b]) for b in blocks if b in kinds}))


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
        model: inside of `with`, its blocks' `forward` is replaced; then its modules are as before, whatever the run has put into them.
        blocks: what does the same as what. A block that is given other inputs than its representative was runs itself.
        tracer: knows the features of inputs and outputs. Without it, inputs are compared by shape and dtype only. An operation log writes
            down for a skipped block what its representative did.
        ran: is filled with the names of the blocks that run, representatives among them.
    """
    runs: dict[str, list[BlockRun]] = {}
    with preserve_modules(model):
        for name in {*blocks.copies, *blocks.copies.values()}:
            module = model.get_submodule(name)
            runs_alike = runs.setdefault(blocks.copies.get(name, name), [])
            module.__dict__["forward"] = _once(module.forward, name, tracer, runs_alike, set() if ran is None else ran)
        yield


def _once(
    forward: Callable[..., Any], name: str, tracer: FeatureTracer | None, runs: list[BlockRun], ran: set[str]
) -> Callable[..., Any]:
    """Return a forward that repeats the outputs of one of these `runs` if it is given inputs like its, and else runs, and is one of them."""
    log = tracer if isinstance(tracer, OperationLog) else None

    def quick(*args: Any, **kwargs: Any) -> Any:
        given, spec = tree_flatten((args, kwargs))
        with unobserved():
            for run in runs:
                if spec == run.input_spec and all(_same(a, _known(x, tracer)) for a, x in zip(run.inputs, given, strict=True)):
                    if log is not None:
                        log.entries[name] += run.operations
                    return _outputs_like(run, given, tracer)
        inputs = [_known(x, tracer) for x in given]
        ran.add(name)
        mark = len(log.entries[name]) if log is not None else 0
        out = forward(*args, **kwargs)
        outputs, output_spec = tree_flatten(out)
        operations: list[Any] = log.entries[name][mark:] if log is not None else []
        runs.append(BlockRun(inputs, spec, [_known(x, tracer) for x in outputs], output_spec, operations))
        return out

    return quick


def _known(x: Any, tracer: FeatureTracer | None) -> Known:
    return x, tracer.shadow(x) if tracer is not None and isinstance(x, Tensor) else TensorFacts()


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
        copy = (t if torch.is_grad_enabled() else t.detach()).clone()
        outputs.append(copy)
        if tracer is not None:
            tracer.put(copy, TensorFacts(_label_now(facts.label, run, given, tracer), None, facts.grad))
            if id(t) in tracer.values:
                tracer.values[id(copy)] = (copy, tracer.values[id(t)][1])
    return tree_unflatten(outputs, run.output_spec)


def _label_now(label: Tensor | None, run: BlockRun, given: list[Any], tracer: FeatureTracer) -> Tensor | None:
    """Return the features of an output: those of the input that it had them from, else those that the traced block has made itself."""
    sources = [
        x for x, (_, known) in zip(given, run.inputs, strict=True) if label is not None and _equal_labels(known.label, label)
    ]
    return tracer.shadow(sources[0]).label if sources else label
