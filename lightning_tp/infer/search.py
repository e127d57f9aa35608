"""Find a plan by running the model: `infer_plan`, and the search behind it, which reads from top to bottom in `Search.attempt`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_tp.core.comm.state import I
from lightning_tp.core.modules.blocks import starred
from lightning_tp.core.modules.call_site import raised_at
from lightning_tp.core.modules.snapshot import MetaWeights, gc_disabled, has_more_than
from lightning_tp.core.ops.random_calls import comparable_runs
from lightning_tp.errors import TPError
from lightning_tp.infer.assign import (
    LEAKED,
    Assignment,
    Parameters,
    assign,
    factor_to_share,
    leaks_partial_gradients,
    refused_by_calls,
    sets_smaller_than_tp,
    weights_inside,
)
from lightning_tp.infer.blocks.identical import Caller
from lightning_tp.infer.blocks.workload import Key, TracedRun, Workload
from lightning_tp.infer.dry_run import dry_run
from lightning_tp.infer.follow.features import shrunk
from lightning_tp.infer.follow.trace import FeatureTrace
from lightning_tp.infer.follow.tracer import FeatureTracer
from lightning_tp.infer.record import record_calls
from lightning_tp.infer.rules import explained, fold, write_plan
from lightning_tp.infer.sequence.boundaries import Replanned
from lightning_tp.infer.sequence.sequence_plan import NotSequenceParallel
from lightning_tp.infer.sequence.streams import with_sequence_parallel
from lightning_tp.infer.tables import needs_full_table
from lightning_tp.plan.plan import Plan
from lightning_tp.styles import Colwise

MOST_REAL = 5_000_000  # parameters, above which a model is traced without computing
MOST_ATTEMPTS = 24  # of a search
MOST_SHARES = 2  # times that a further part of one fused weight is given to every rank


def infer_plan(model: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...], tp: int) -> Plan:
    """Find how to shard a model over `tp` ranks by running it, whatever its modules are called.

    Nothing is changed and nothing is sent: the forward runs in this process, on the model's own weights or on the meta device, and every
    feature of every weight is followed to where it is used.

    Args:
        model: any transformer; unsplit.
        inputs: what its forward is called with: a mapping of keyword arguments, or a tuple.
        tp: the number of ranks that share it.

    Returns:
        The plan, not yet checked against the model (`parallelize` does it).

    Raises:
        TPError: if the model can't be run.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> {rule.pattern: rule.style.name for rule in infer_plan(mlp, (torch.zeros(2, 4, 8),), tp=2).rules}
        {'0': 'colwise', '2': 'rowwise', '**': 'replicate'}
    """
    return infer_by_call(model, call_with, dict(inputs) if isinstance(inputs, Mapping) else tuple(inputs), tp)


def call_with(model: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...]) -> Any:
    """Call a model with keyword or positional arguments."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def infer_by_call(model: nn.Module, call: Caller, inputs: Any, tp: int) -> Plan:
    """Find a plan as `infer_plan` does, for a model that runs by `call(model, inputs)`: a training step, for instance.

    Raises:
        TPError: as `infer_plan`.
    """
    if tp < 1:
        raise TPError(f"`tp={tp}`: the number of ranks that share one model is 1 or more.")
    if lazy := next((n for n, p in model.named_parameters() if is_lazy(p)), None):
        raise TPError(
            f"`{lazy}` belongs to a lazy module, which has no weights before its first batch: there is nothing to split. Give the layer its "
            "sizes, or run a batch through the model in `__init__` or `configure_model`."
        )
    workload = Workload(model, call, inputs, tp)
    with comparable_runs(model), gc_disabled():
        if has_more_than(model, MOST_REAL):
            try:
                with MetaWeights(model) as on_meta:
                    return _search(workload, on_meta.weights)
            except Exception:  # its code may decide by values: trace it with real ones
                pass
        try:
            return _search(workload, nullcontext)
        except TPError:
            raise
        except Exception as error:
            raise TPError(
                f"Could not infer a plan: tracing `{type(model).__name__}` raised {type(error).__name__}: {error}"
                f"{raised_at(error.__traceback__)}. Check that it runs on these inputs in a single process, or pass `plan=`."
            ) from error


def _search(workload: Workload, real_weights: Callable[[], AbstractContextManager[Any]]) -> Plan:
    folded = workload.with_identical_blocks()
    try:
        return Search(folded, real_weights).find()
    except Exception:
        if not folded.blocks.copies:
            raise
    return Search(workload, real_weights).find()  # code around the blocks looks for what only each of them makes


@dataclass
class Search:
    """The search for a plan: what it runs, and what it has found so far. In names of modules and weights, numbers may be stars."""

    workload: Workload
    real_weights: Callable[[], AbstractContextManager[Any]] = nullcontext  # in it, the model has its weights
    kept_whole: dict[Key, str] = field(default_factory=dict)  # weights that every rank has all of, and why
    shared: dict[Key, Tensor] = field(default_factory=dict)  # features of fused weights that every rank has: keys of few heads
    shares: Counter[str] = field(default_factory=Counter)  # how often a part of a weight (stars) was shared
    not_gathered: set[str] = field(default_factory=set)  # modules (stars) in which layers with an all-gathered output did not run
    convolutions: set[str] = field(default_factory=set)  # weights of convolutions that features were followed through
    parameters: Parameters = field(init=False)  # of the model, each by the first of its names
    tables: frozenset[Key] = field(init=False)  # embeddings: their columns are not sharded

    def __post_init__(self) -> None:
        model = self.workload.model
        self.parameters = dict(model.named_parameters())
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        self.tables = frozenset((n, 1) for n, p in self.parameters.items() if id(p) in embeddings)
        whole = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and needs_full_table(m, self.workload.tp)}
        self._keep_all_whole((n for n, p in self.parameters.items() if id(p) in whole), "an embedding's code needs the full table")

    def find(self) -> Plan:
        """Attempt to write a plan until one runs; each attempt that fails keeps more weights whole."""
        for attempt in range(MOST_ATTEMPTS):
            if attempt == MOST_ATTEMPTS // 2:  # a chain of convolutions is given up one by one: not the rest of the model for it
                self._keep_all_whole(self.convolutions, f"no way to shard its channels was found in {attempt} runs")
            plan = self.attempt()
            if plan is not None:
                return plan
        self._keep_all_whole(self.parameters, "the trace does not show how its features are used")
        self.shared = {}
        plan = self.attempt()
        assert plan is not None, "a plan that shards nothing is always right"
        return plan

    def attempt(self) -> Plan | None:
        """Write a plan by what is known so far; None if it showed that more has to be kept whole, or shared."""
        run = self.follow()
        if self.refuse_sets(run):
            return None
        assignment = assign(self.workload, run, self.whole, self.shared, self.parameters)
        recording = record_calls(self.workload, assignment)
        if refused := refused_by_calls(assignment, recording.changes, recording.outputs, self.workload.tp):
            self.keep_whole(refused, run.trace)
            return None
        if recording.changes.failed and self.shared:
            self._share_nothing()
            return None
        draft = write_plan(self.workload, assignment, recording, self.kept_whole, self.not_gathered)
        plan = draft
        if self.workload.tp > 1:
            plan = with_sequence_parallel(self.workload, draft, partial(self._replan, draft, assignment))
        plan = Plan(fold(plan.rules, self.workload.model), plan.source)
        with self.real_weights():
            failure = dry_run(self.workload, plan)
            if failure is not None and plan != draft:
                plan, failure = draft, dry_run(self.workload, draft)
        if failure is not None and run.trace.nodes:
            self.not_gathered.add(starred(failure.module))
            self.keep_whole(weights_inside(self.workload.blocks.representative(failure.module), failure.why, run.trace), run.trace)
            return None
        return explained(plan, self.kept_whole, self.parameters)

    @property
    def whole(self) -> frozenset[Key]:
        """Weights, by (parameter, dim), that make no features."""
        return self.tables | self.kept_whole.keys()

    def follow(self) -> TracedRun:
        """Follow the features of one run. Blocks that had to run, since their inputs are not those of their representative, stay in."""
        run = self.workload.trace(set(self.whole), self.shared)
        self.convolutions |= run.trace.convolved
        self.workload = replace(self.workload, blocks=self.workload.blocks.without(run.ran))
        return run

    def refuse_sets(self, run: TracedRun) -> bool:
        """Keep weights whole whose features form fewer sets than there are ranks, or share a part of one; return whether there are any."""
        trace, leaked = run.trace, leaks_partial_gradients(run)
        if leaked and self.shared:
            self._share_nothing()
            return True
        refused = dict.fromkeys(trace.nodes, LEAKED) if leaked else sets_smaller_than_tp(trace, self.workload.tp, self.parameters)
        if refused and (leaked or not self.share_factor(refused, trace)):
            self.keep_whole(refused, trace)
        return bool(refused)

    def _share_nothing(self) -> None:
        self.shared, self.shares = {}, Counter(dict.fromkeys(map(starred, self.parameters), MOST_SHARES))

    def share_factor(self, refused: Mapping[Key, str], trace: FeatureTrace) -> bool:
        """Give every rank the part of a fused weight that joins all others, in all blocks; not more than MOST_SHARES times."""
        found = factor_to_share(refused, trace)
        if found is None:
            return False
        (name, dim), mask = found
        star = starred(name)
        self.shares[star] += 1
        if self.shares[star] > MOST_SHARES:
            self.shared = {key: m for key, m in self.shared.items() if starred(key[0]) != star}
            return False
        for n, p in self.parameters.items():
            if starred(n) == star and p.shape[dim] == mask.numel():
                self.shared[n, dim] = self.shared.get((n, dim), torch.zeros_like(mask)) | mask
        return True

    def keep_whole(self, refused: Mapping[Key, str], trace: FeatureTrace) -> None:
        """Keep these weights whole, and those of the same name and shape in other blocks; all weights, if these were kept whole before."""
        if self.whole.issuperset(refused):
            refused = dict.fromkeys(trace.nodes, "the trace does not show how its features are used")
        reasons = {(starred(n), self.parameters[n].shape, d): why for (n, d), why in refused.items()}
        for n, p in self.parameters.items():
            for d in range(p.ndim):
                if (starred(n), p.shape, d) in reasons:
                    self.kept_whole[n, d] = reasons[starred(n), p.shape, d]

    def _keep_all_whole(self, names: Iterable[str], why: str) -> None:
        self.kept_whole.update({(n, d): why for n in names for d in range(self.parameters[n].ndim)})

    def _replan(self, plan: Plan, assignment: Assignment, prepare: Callable[[FeatureTracer], None]) -> Replanned:
        """Write the plan again where modules are given a stream that each rank has a part of the gradient of."""
        recording = record_calls(self.workload, assignment, prepare)
        refused = refused_by_calls(assignment, recording.changes, recording.outputs, self.workload.tp)
        for module, why in recording.changes.failed.items():
            raise NotSequenceParallel(f"{module}: {why}", {module})
        for (weight, _), why in refused.items():
            raise NotSequenceParallel(f"{weight}: {why}", {weight.rpartition(".")[0]})
        if any(not bool(shrunk(label).any()) for label in recording.outputs):
            raise NotSequenceParallel("a partial gradient leaves the model")
        gathered = {r.pattern for r in plan.rules if isinstance(r.style, Colwise) and r.style.output == I}
        trace = self._as_full(recording.trace, gathered, assignment.trace)
        seen = replace(assignment, trace=replace(assignment.trace, local_uses=trace.local_uses, whole_uses=trace.whole_uses))
        again = replace(recording, trace=trace)
        return Replanned(write_plan(self.workload, seen, again, self.kept_whole, self.not_gathered), trace, assignment.mixed)

    def _as_full(self, trace: FeatureTrace, gathered: set[str], before: FeatureTrace) -> FeatureTrace:
        """Return a trace in which layers with an all-gathered output are used as before, whatever their input is now."""
        modules = dict(self.workload.model.named_modules())
        names = {n for where in gathered if where in modules for n, _ in modules[where].named_parameters(prefix=where)}
        local = {n: users for n, users in trace.local_uses.items() if n not in names}
        full = {n: users for n, users in trace.whole_uses.items() if n not in names}
        full |= {n: before.whole_uses[n] for n in names if n in before.whole_uses}
        return replace(trace, local_uses=local, whole_uses=full)
