"""Follow the tokens of a stream through its blocks: each token gets a label, which has to come out of them unmixed.

Between the regions a token may meet only itself and parameters. In a region, code has the full sequence, and the labels are hidden from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tp.core.comm.axis import even_shard
from lightning_tp.core.modules.blocks import enclosing, starred
from lightning_tp.core.modules.call_site import call_site
from lightning_tp.infer.blocks.workload import TracedRun, Workload
from lightning_tp.infer.calls.local_sizes import PerRankInt
from lightning_tp.infer.calls.recorder import CallRecorder
from lightning_tp.infer.follow.features import shrunk
from lightning_tp.infer.follow.trace import FeatureTrace
from lightning_tp.infer.follow.tracer import FeatureTracer
from lightning_tp.infer.sequence.boundaries import LabelHooks, first_tensor, tensor_args
from lightning_tp.infer.sequence.partial_sums import PartialSums, tensors_of
from lightning_tp.infer.sequence.rules import sharded_names
from lightning_tp.infer.sequence.sequence_plan import Alternatives, Arg, NotSequenceParallel, Reduction, Region, SequencePlan
from lightning_tp.plan.rule import Rule
from lightning_tp.styles import Colwise, RewrittenCalls, Rowwise
from lightning_tp.styles.calls.call import CONVOLUTIONS, READS, Call

LEAST_BLOCKS = 2  # that follow each other: at the ends of a stream it is all-gathered once more
MOST_DIMS = 8  # of a parameter


def follow_tokens(
    workload: Workload, rules: list[Rule], blocks: tuple[str, ...], regions: Iterable[Region], alternatives: Alternatives
) -> SequencePlan:
    """Follow the tokens of one run, and return what it takes to shard their stream.

    Args:
        rules: of the plan without sequence parallelism, one for each module.
        blocks: between which the stream may be sharded, in the order in which they run.
        regions: of all blocks.
        alternatives: what is tried in another way than the most usual one.

    Raises:
        NotSequenceParallel: where the tokens do not stay apart.
    """
    whole = {(n, d) for n, _ in workload.model.named_parameters() for d in range(MOST_DIMS)}  # tokens have the labels, not features
    trackers: list[StreamTracker] = []

    def recorder_of(tracer: FeatureTracer) -> CallRecorder:
        trackers.append(StreamTracker(workload, tracer, rules, blocks, regions, alternatives))
        return trackers[-1].recorder

    run = workload.trace(whole, {}, recorder_of)
    tracker = trackers[0]
    tracker.check_stream()
    if unseen := workload.untracked_reads(whole, {}, recorder_of, tracker.recorder, run.tracer):
        computing = tracker.regions_around({read[0] for read in unseen})
        raise tracker.refusal("its code computes with the length of the sequence", computing)
    _check_leaks(tracker, run)
    return tracker.sequence_plan(run.trace)


def _check_leaks(tracker: StreamTracker, run: TracedRun) -> None:
    """Refuse a stream if sharded tokens come to what should not take them."""
    if any(bool(label.any()) for label in run.outputs):
        raise tracker.refusal("sharded tokens leave the model")
    readers = [users for n, users in run.trace.local_uses.items() if enclosing(n, tracker.sharded)]
    if readers:
        raise tracker.refusal("a sharded layer reads sharded tokens", set.union(*readers))
    if not all(enclosing(n, tracker.blocks) for n in run.trace.local_uses):
        raise tracker.refusal("something between the blocks works on sharded tokens")


class TokenRecorder(CallRecorder):
    """Show the calls between the regions to a tracker, and note modules with a call that would have to change."""

    remakes = True

    def __init__(self, stream: StreamTracker, tracer: FeatureTracer, tp: int, full_size_reads: Any) -> None:
        super().__init__(tracer, torch.full((1,), -1), tp, set(), {}, {}, full_size_reads)
        self.stream = stream
        self.computed = ComputedParameters(tracer)
        self.changed: set[str] = set()

    def analyse_call(self, name: str, func: Any, args: Any, kwargs: Any, out: Any, module: str, frame: Any) -> None:
        if not self.stream.open:
            return
        self.computed.follow(tensors_of((args, kwargs)), out, module)
        self.stream.follow_call(name, args, kwargs, out, module, frame)
        before = len(self.found.broken)
        super().analyse_call(name, func, args, kwargs, out, module, frame)
        last = self.found.calls.get(module, [None])[-1]
        if len(self.found.broken) > before or (last is not None and (last.operands or last.sizes or last.pieces or last.items)):
            self.changed.add(module)
            self.stream.note_alternatives(args, kwargs, last)
        self.stream.check_apart(module)

    def has_equal_gradient(self, t: Tensor) -> bool:
        return t not in self.computed and super().has_equal_gradient(t)


class ComputedParameters:
    """Tensors that are computed from parameters alone, and what they meet: pairs of a parameter and the module whose code it is."""

    def __init__(self, tracer: FeatureTracer) -> None:
        self.tracer = tracer
        self.computed_in: set[tuple[str, str]] = set()  # where such a tensor is computed
        self.on_shards: set[tuple[str, str]] = set()  # where one meets the sequence shard
        self.on_full: set[tuple[str, str]] = set()  # where one meets full activations that have a gradient
        self._parameters: dict[int, tuple[Tensor, set[str]]] = {}  # that a tensor is computed from

    def __contains__(self, t: Tensor) -> bool:
        return id(t) in self._parameters

    def follow(self, given: list[Tensor], out: Any, module: str) -> None:
        """Note what a call makes of parameters, and of such tensors, in the code of a module."""
        names = [self._names_of(t) for t in given]
        if not any(names):
            return
        facts = [self.tracer.shadow(t) for t in given]
        computed = {(n, module) for t, of in zip(given, names, strict=True) if t in self for n in of}
        if any(f.label is not None for f in facts):
            self.on_shards |= computed
        elif any(f.grad and not of for f, of in zip(facts, names, strict=True)):
            self.on_full |= computed
        else:
            every = set.union(*names)
            self.computed_in |= {(n, module) for n in every}
            made = [(t, self.tracer.shadow(t)) for t in tensors_of(out)]
            self._parameters.update({id(t): (t, every) for t, f in made if f.grad and f.param is None})

    def _names_of(self, t: Tensor) -> set[str]:
        param = self.tracer.shadow(t).param
        return {param[0]} if param is not None else self._parameters[id(t)][1] if t in self else set()


class StreamTracker(LabelHooks):
    """Follow the tokens of one stream through a run, by hooks at its blocks, regions and row-wise layers, and by the calls in between."""

    def __init__(
        self,
        workload: Workload,
        tracer: FeatureTracer,
        rules: list[Rule],
        blocks: tuple[str, ...],
        regions: Iterable[Region],
        alternatives: Alternatives,
    ) -> None:
        super().__init__(workload.model, tracer)
        self.tp, self.blocks, self.alternatives = workload.tp, blocks, alternatives
        self.regions = {r.name: replace(r) for r in regions}
        self.recorder = TokenRecorder(self, tracer, workload.tp, self.alternatives.full_size_reads)
        self.column_wise = {r.pattern for r in rules if isinstance(r.style, Colwise)}
        self.sharded = sharded_names(rules)
        self.adapted = {r.pattern for r in rules if isinstance(r.style, RewrittenCalls)}
        self.summing_calls = {  # (module, function, place) -> whether each call of it sums over ranks
            (r.pattern, c.name, c.at): [other.leave for other in r.style.calls if (other.name, other.at) == (c.name, c.at)]
            for r in rules
            if isinstance(r.style, RewrittenCalls)
            for c in r.style.calls
        }
        self.tokens: Tensor | None = None  # their labels
        self.shape: tuple[int, ...] = ()  # of the stream
        self.entry: Arg | None = None
        self.open = self.finished = False  # open: between the input of the first block and the output of the last
        self.arguments: dict[int, Arg] = {}  # of the region that was entered last: by which its tensors came
        self.partial_sums = PartialSums()  # in regions that reduce when they return
        self.reduced_layers: set[str] = set()
        self.deferred_layers: set[str] = set()
        self.reduced_calls: dict[Any, str | None] = {}  # (module, function, place) -> the bias that is added to the sum
        self.gathered: dict[tuple[int, str], Tensor] = {}  # what is all-gathered, by whom: column-wise layers share it
        self.problem: tuple[str, set[str]] | None = None  # the first: why, and in which modules
        self.other_ways = Alternatives()
        for rule in rules:
            if isinstance(rule.style, Rowwise) and enclosing(rule.pattern.rpartition(".")[0], self.blocks):
                self.hook(rule.pattern, None, partial(self._after_row_wise, rule.pattern))
        for name in self.regions:
            self.hook(name, partial(self._enter_region, name), partial(self._leave_region, name))
        for name in self.blocks:
            self.hook(name, partial(self._enter_block, name), partial(self._leave_block, name))

    def _fail(self, why: str, *modules: str) -> None:
        self.problem = self.problem or (why, set(modules))

    def _is_labelled(self, t: Tensor) -> bool:
        return self.tracer.shadow(t).label is not None

    def _along_dim_1(self, t: Tensor) -> Tensor:
        """Return the labels of tokens that lie along dim 1 of a tensor; length 1 in the other dims."""
        assert self.tokens is not None
        return self.tokens.view(1, -1, *[1] * (t.ndim - 2))

    def _label_tokens(self, t: Tensor) -> None:
        self.relabel(t, self._along_dim_1(t).expand(t.shape))

    def _lies_along_dim_1(self, t: Tensor) -> bool:
        """Whether the tokens lie along dim 1, all of them, and nothing else does."""
        label = self.tracer.shadow(t).label
        if label is None or self.tokens is None or t.ndim < 2 or t.shape[1] != self.tokens.numel():
            return False
        return bool((shrunk(label) == self._along_dim_1(t)).all())

    def check_apart(self, module: str) -> None:
        """Note it as a problem if tokens have met in the code of a module."""
        if self.problem is not None or self.tokens is None:
            return
        if not torch.equal(self.tracer.trace.classes.find(self.tokens), self.tokens):
            self._fail("tokens meet outside attention", module)

    def _enter_block(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = tensor_args(args, kwargs)
        if self.tokens is None:
            stream = next(((k, t) for k, t in given if t.is_floating_point() and t.ndim == 3), None)
            if name != self.blocks[0] or stream is None:
                self._fail("its first block is given no (batch, sequence, width)")
            else:
                self._begin(*stream)
        elif name == self.blocks[0]:
            self._fail("its blocks run more than once")
        elif not any(self._is_labelled(t) for _, t in given):
            self._fail("something between its blocks needs the full sequence")

    def _begin(self, entry: Arg, x: Tensor) -> None:
        length = x.shape[1]
        self.entry, self.shape, self.open = entry, tuple(x.shape), True
        if length < self.tp:
            self._fail("the sequence is shorter than tp")
        self.tokens = self.tracer.trace.classes.new(length)
        ranks = torch.cat([torch.full((len(even_shard(length, r, self.tp)),), r) for r in range(self.tp)])
        self.recorder.layouts.owner = torch.cat((torch.full((int(self.tokens[0]),), -1), ranks))
        self._label_tokens(x)

    def _leave_block(self, name: str, module: nn.Module, args: Any, out: Any) -> None:
        first = first_tensor(out)
        if first is None or tuple(first.shape) != self.shape or not self._lies_along_dim_1(first):
            self._fail("a block does not return the stream", *(r for r in self.regions if r.startswith(f"{name}.")))
            return
        if any(t is not first and self._is_labelled(t) for t in tensors_of(out)):
            self._fail("a block returns more than the stream")
        if name == self.blocks[-1]:
            self.open, self.finished = False, True
            self.relabel(first, None)

    def _enter_region(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        region, sharded = self.regions[name], self.alternatives.sharded_args
        arriving = [(k, t) for k, t in tensor_args(args, kwargs) if self._is_labelled(t) and (starred(name), k) not in sharded]
        if any(not self._lies_along_dim_1(t) for _, t in arriving):
            self._fail(f"`{name}` is given tokens that do not lie along dim 1", name)
        args_now = tuple(k for k, _ in arriving)
        if region.args is not None and set(region.args) != set(args_now):
            self._fail(f"`{name}` is given the stream in one call, and full activations in another", name)
        region.args = args_now
        self.gathered.update({(id(t), "" if name in self.column_wise else name): t for _, t in arriving})
        self.arguments = {id(t): k for k, t in arriving}
        self.enter_region(region, [t for _, t in arriving], lambda t: None)

    def _leave_region(self, name: str, module: nn.Module, args: Any, out: Any) -> None:
        self.leave_region()
        first = first_tensor(out)
        if self.regions[name].reduction is not Reduction.AT_RETURN:
            if first is not None and self._is_labelled(first) and not self._lies_along_dim_1(first):
                self._fail(f"`{name}` returns tokens that do not lie along dim 1", name)
            return
        if any(t in self.partial_sums for t in tensors_of(out) if t is not first):
            self._fail(f"`{name}` returns partial sums beside its result", name)
        if first is None or first not in self.partial_sums:
            return
        if tuple(first.shape) != self.shape:
            self._fail(f"`{name}` returns a partial sum of another shape", name)
            return
        self.regions[name].reduced = True
        self.partial_sums.remove(first)
        self._label_tokens(first)

    def _after_row_wise(self, name: str, module: nn.Module, args: Any, out: Any) -> None:
        if self.open and self._reduce(out, name):
            self.reduced_layers.add(name)

    def _reduce(self, out: Tensor, module: str, along_dim_1: bool = True) -> bool:
        """Return whether partial sums are reduced where they are made: if the tokens lie along dim 1, in the shape of the stream."""
        region = self.entered[-1][0] if self.entered else Region("", Reduction.OF_STREAM)
        if region.reduction is Reduction.AT_RETURN:
            region.reduced = region.reduced or False
            self.partial_sums.add(out)
            self.deferred_layers.add(module)
            return False
        any_width = out.ndim == 3 and tuple(out.shape[:2]) == self.shape[:2]
        if along_dim_1 and (any_width if region.reduction is Reduction.OF_ANY_WIDTH else tuple(out.shape) == self.shape):
            region.reduced = True
            self._label_tokens(out)
            return True
        region.full_inside = True  # the code goes on with the full tensor, and may come to another partial sum
        region.other_width |= any_width
        return False

    def follow_call(self, name: str, args: Any, kwargs: Any, out: Any, module: str, frame: Any) -> None:
        """Follow a call of a torch function: one that sums over ranks, or one on partial sums."""
        place = (module, name, call_site(frame) if module in self.adapted else ())
        sums = self.summing_calls.get(place, [])
        if not any(sums):
            if not self.partial_sums.follow(name, args, kwargs, out):
                self._fail(f"`{module}`: {name} of a partial sum that is not reduced yet", module)
        elif not all(sums) or len(tensors_of(out)) != 1:
            self._fail(f"`{module}`: {name} sums over ranks here and not there", module)
        elif self._reduce(tensors_of(out)[0], module, along_dim_1=name not in CONVOLUTIONS):
            given = [self.tracer.shadow(t).param for t in tensors_of((args, kwargs))]
            self.reduced_calls[place] = next((p[0] for p in given if p is not None and p[0] not in self.sharded), None)

    def note_alternatives(self, args: Any, kwargs: Any, change: Call | None) -> None:
        """Note whether an argument of the region, or a size, had in another way would make a call right that is not."""
        given = tensors_of((args, kwargs))
        tokens = any(self._is_labelled(t) for t in given)
        found = self.other_ways
        if self.entered and tokens and len(self.entered[-1][1]) > 1:  # a residual beside what is read
            star = starred(self.entered[-1][0].name)
            inside = {(star, self.arguments[id(t)]) for t in given if id(t) in self.arguments and not self._is_labelled(t)}
            self.other_ways = replace(found, sharded_args=found.sharded_args | inside)
        elif not tokens and change is not None and change.sizes:
            sizes = [n for a in (*args, *kwargs.values()) for n in (a if isinstance(a, (tuple, list)) else (a,))]
            reads = {read for n in sizes if isinstance(n, PerRankInt) for read in n.reads}
            self.other_ways = replace(found, full_size_reads=found.full_size_reads | reads)

    def refusal(self, why: str, modules: Iterable[str] = (), alternatives: Alternatives | None = None) -> NotSequenceParallel:
        """Return a refusal of this stream."""
        return NotSequenceParallel(why, modules, alternatives, (r.name for r in self.regions.values() if r.other_width))

    def check_stream(self) -> None:
        """Refuse the stream, after the run, if something keeps it from being sharded as in Megatron-LM."""
        unreduced = {name for name, region in self.regions.items() if region.reduced is False}
        if self.problem is not None:
            why, modules = self.problem
            raise self.refusal(why, modules | unreduced, self.other_ways)
        if self.tokens is None or not self.finished:
            raise self.refusal("its blocks did not run")
        if unreduced:
            raise self.refusal("a region does not return a partial sum", unreduced)
        self.check_apart("")
        if self.problem is not None:
            raise self.refusal(*self.problem)
        if self.recorder.changed:
            why = "its code has sizes of the sequence in it, or full activations meet tokens"
            raise self.refusal(why, self.regions_around(self.recorder.changed), self.other_ways)
        if PerRankInt.diverging - self.alternatives.full_size_reads:
            deciding = {read[0] for read in PerRankInt.diverging}
            raise self.refusal("its code decides by the length of the sequence", self.regions_around(deciding))
        reductions = len(self.reduced_layers) + len(self.reduced_calls)
        reductions += sum(r.reduces_at_return for r in self.regions.values())
        if len(self.blocks) < LEAST_BLOCKS or not reductions:
            raise self.refusal(f"{reductions} reductions in {len(self.blocks)} blocks: at its ends it is all-gathered once more")
        if len(self.gathered) > reductions:
            raise self.refusal(f"the stream would be all-gathered {len(self.gathered)} times for {reductions} reductions")

    def regions_around(self, modules: set[str]) -> set[str]:
        """Return these modules, and for those that are blocks the regions whose results the block's own code goes on with."""
        inside = {r for m in modules if m in self.blocks for r in self.regions if r.startswith(f"{m}.")}
        unreduced = {r for r in inside if self.regions[r].full_inside and not self.regions[r].reduced}
        return modules | (unreduced or inside)

    def sequence_plan(self, trace: FeatureTrace) -> SequencePlan:
        """Return what it takes to shard the stream, after a run without refusals."""
        computed = self.recorder.computed
        on_shards = _pairs(trace.local_uses) | computed.on_shards
        parameters = {n for n, _ in on_shards}
        on_full = {(n, m) for n, m in (_pairs(trace.whole_uses) - computed.computed_in) | computed.on_full if n in parameters}
        on_shards |= {(bias, module) for (module, _, _), bias in self.reduced_calls.items() if bias is not None}
        layers, calls = (self.reduced_layers, self.deferred_layers), set(self.reduced_calls)
        return SequencePlan({self.blocks: self.entry}, self.regions, *layers, calls, on_shards, on_full, self._length_reads())

    def _length_reads(self) -> dict[str, list[Call]]:
        """Return the places where code reads sizes of the sequence shard, changed so that it reads the full length."""
        reads: dict[str, list[Call]] = {}
        for module, calls in self.recorder.found.calls.items():
            places = {(c.name, c.at) for c in calls if c.name in READS and c.sizes}
            for c in [c for c in calls if (c.name, c.at) in places]:
                if any(dim != 1 for changes in c.sizes for dim, _, _ in changes):
                    raise self.refusal(f"`{module}` reads the length of the sequence along another dim than 1", {module})
                full = tuple(tuple((dim, 0, -1) for dim, _, _ in changes) for changes in c.sizes)
                reads.setdefault(module, []).append(replace(c, sizes=full))
        return reads


def _pairs(uses: Mapping[str, set[str]]) -> set[tuple[str, str]]:
    return {(parameter, module) for parameter, modules in uses.items() for module in modules}
