"""Follow the sequence dimension of activations through the calls of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tp._compat import unobserved
from lightning_tp.core.comm.axis import even_shard
from lightning_tp.core.modules.blocks import starred
from lightning_tp.core.modules.call_site import call_site
from lightning_tp.infer.calls.local_sizes import PerRankInt
from lightning_tp.infer.calls.recorder import CallRecorder, untracked_size_reads
from lightning_tp.infer.follow.features import shrunk
from lightning_tp.infer.follow.run import leaves, run
from lightning_tp.infer.follow.trace import FeatureTrace, TensorFacts
from lightning_tp.infer.follow.tracer import FeatureTracer
from lightning_tp.infer.sequence.stream import (
    FACTORS,
    INTO,
    LEAST_BLOCKS,
    MOVES,
    SUMS,
    ZEROS,
    Arg,
    NotSequenceParallel,
    SequencePlan,
    _Choices,
    _Region,
)
from lightning_tp.plan.rule import Rule
from lightning_tp.styles import Colwise, Replicate, RewrittenCalls, Rowwise
from lightning_tp.styles.calls.call import CONVOLUTIONS, READS, Call


def _cut(
    model: nn.Module,
    call: Callable[[nn.Module, Any], Any],
    inputs: Any,
    rules: list[Rule],
    blocks: list[str],
    tp: int,
    regions: dict[str, _Region],
    choices: _Choices,
    once: Any,
) -> SequencePlan:
    """Follow the tokens through the blocks.

    Raises:
        CantBeInShards: where they do not stay apart.
    """
    names = {n for n, _ in model.named_parameters()}
    everything = {(n, d) for n in names for d in range(8)}
    made: list[_Stream] = []

    def recorder(tracer: FeatureTracer) -> CallRecorder:
        made.append(_Stream(model, tracer, regions, blocks, rules, tp, choices))
        return made[-1].recorder

    try:
        trace, out, tracer = run(model, call, inputs, everything, {}, recorder, during=once)
    finally:
        for stream in made:
            stream.close()
    stream = made[0]
    stream.check(trace)
    try:
        unseen = untracked_size_reads(model, call, inputs, everything, {}, recorder, once, stream.recorder, tracer)
    finally:
        for again in made[1:]:
            again.close()
    if unseen:
        raise NotSequenceParallel("its code computes with the length of the sequence", stream._around({read[0] for read in unseen}))
    if any(label is not None and bool(label.any()) for label in (tracer.shadow(t).label for t in leaves(out))):
        raise NotSequenceParallel("tokens in shards leave the model")
    split = [r.pattern for r in rules if r.style.splits_parameters and not isinstance(r.style, Replicate)]
    if of := [m for n, m in trace.local_uses.items() if any(n == s or n.startswith(f"{s}.") for s in split)]:
        raise NotSequenceParallel("a layer that is split reads tokens in shards", set.union(*of))
    if not all(any(n.startswith(f"{b}.") for b in blocks) for n in trace.local_uses):
        raise NotSequenceParallel("something between the blocks works on tokens in shards")
    return stream.found(trace)


def _unseen(hook: Callable[..., None]) -> Callable[..., None]:
    """What a hook reads is not what the code reads."""

    @wraps(hook)
    def quiet(*args: Any) -> None:
        with unobserved():
            hook(*args)

    return quiet


class _Tokens(CallRecorder):
    """Sees the calls between the regions, where a token may meet itself and parameters only."""

    remakes = True

    def __init__(self, stream: _Stream, tracer: FeatureTracer, tp: int) -> None:
        super().__init__(tracer, torch.full((1,), -1), tp, set(), {}, {}, stream.choices.reads)
        self.stream = stream
        self.made_of: dict[int, tuple[Tensor, set[str]]] = {}  # tensors that are computed from parameters alone: 1 + weight
        self.made_in: dict[str, set[str]] = {}  # parameter -> modules that compute such tensors of it
        self.on_tokens: dict[str, set[str]] = {}
        self.on_whole: dict[str, set[str]] = {}
        self.bad: set[str] = set()  # modules with a call that can't be as it is

    def analyse_call(self, name: str, func: Any, args: Any, kwargs: Any, out: Any, module: str, frame: Any) -> None:
        if not self.stream.open:
            return
        self._follow_parameters(args, kwargs, out, module)
        self.stream.call(name, args, kwargs, out, module, frame)
        before = len(self.found.broken)
        super().analyse_call(name, func, args, kwargs, out, module, frame)
        last = self.found.calls.get(module, [None])[-1]
        if len(self.found.broken) > before or (last is not None and (last.operands or last.sizes or last.pieces or last.items)):
            self.bad.add(module)
            assert last is not None or len(self.found.broken) > before
            self.stream.other_ways(args, kwargs, last)
        self.stream.joined(module)

    def _follow_parameters(self, args: Any, kwargs: Any, out: Any, module: str) -> None:
        tensors = _all((args, tuple(kwargs.values())))
        shadows = [self.tracer.shadow(t) for t in tensors]
        names: dict[int, set[str]] = {}
        for t, s in zip(tensors, shadows, strict=True):
            if s.param is not None:
                names[id(t)] = {s.param[0]}
            elif id(t) in self.made_of:
                names[id(t)] = self.made_of[id(t)][1]
        if not names:
            return
        made = {n for t in tensors if id(t) in self.made_of for n in names[id(t)]}
        if any(s.label is not None for s in shadows):
            for n in made:
                self.on_tokens.setdefault(n, set()).add(module)
        elif all(id(t) in names or not s.grad for t, s in zip(tensors, shadows, strict=True)):
            of = set.union(*names.values())
            for t in _all(out):
                if (s := self.tracer.shadow(t)).grad and s.param is None:
                    self.made_of[id(t)] = (t, of)
            for n in of:
                self.made_in.setdefault(n, set()).add(module)
        else:
            for n in made:
                self.on_whole.setdefault(n, set()).add(module)

    def has_equal_gradient(self, t: Tensor) -> bool:
        return id(t) not in self.made_of and super().has_equal_gradient(t)


class _Stream:
    """Follows the tokens of one stream through a run: hooks at the doors of its blocks and regions."""

    def __init__(
        self,
        model: nn.Module,
        tracer: FeatureTracer,
        regions: dict[str, _Region],
        blocks: list[str],
        rules: list[Rule],
        tp: int,
        choices: _Choices,
    ) -> None:
        self.tracer, self.regions, self.blocks, self.tp = tracer, regions, blocks, tp
        self.nodes: Tensor | None = None
        self.shape: tuple[int, ...] = ()
        self.entry: Arg | None = None
        self.open = self.left = False
        self.problem: NotSequenceParallel | None = None
        self.choices, self.otherwise = choices, _Choices()
        self.recorder = _Tokens(self, tracer, tp)
        self.inside: list[tuple[_Region, list[tuple[Tensor, TensorFacts]]]] = []  # regions that run, and what is whole in them
        self.arguments: dict[int, Arg] = {}  # of the region that runs: by which they came
        self.terms: dict[int, Tensor] = {}  # of sums over ranks, in regions that sum when they return
        self.zeros: dict[int, Tensor] = {}
        self.sums: set[str] = set()
        self.deferred: set[str] = set()
        self.call_sums: dict[tuple[str, str, Any], str | None] = {}
        self.sum_calls: dict[str, dict[Any, list[bool]]] = {}  # module -> (function, place) -> whether each call of it sums
        self.styles = {r.pattern: r.style for r in rules}
        self.split = {r.pattern for r in rules if r.style.splits_parameters and not isinstance(r.style, Replicate)}
        self.gathered: dict[tuple[int, str], Tensor] = {}  # by whom: layers share what is gathered
        self.handles: list[Any] = []
        for rule in rules:
            if isinstance(rule.style, RewrittenCalls):
                for c in rule.style.calls:
                    self.sum_calls.setdefault(rule.pattern, {}).setdefault((c.name, c.at), []).append(c.leave)
            if isinstance(rule.style, Rowwise) and any(rule.pattern.startswith(f"{b}.") for b in blocks):
                self._hook(model, rule.pattern, None, self._sum_of_layer(rule.pattern))
        for name in regions:
            self._hook(model, name, self._enter_region(name), self._leave_region(name))
        for name in blocks:
            self._hook(model, name, self._enter_block(name), self._leave_block(name))

    def _hook(self, model: nn.Module, name: str, enter: Any, leave: Any) -> None:
        module = model.get_submodule(name)
        if enter is not None:
            self.handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        self.handles.append(module.register_forward_hook(leave))

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()

    def _label(self, t: Tensor) -> None:
        assert self.nodes is not None
        self.tracer.put(t, TensorFacts(_along(self.nodes, t), None, self.tracer.shadow(t).grad))

    def _in_place(self, t: Tensor) -> bool:
        """Whether dim 1 is the tokens, and nothing else is."""
        label = self.tracer.shadow(t).label
        if label is None or self.nodes is None or t.ndim < 2 or t.shape[1] != self.nodes.numel():
            return False
        small = shrunk(label)
        return bool((small == self.nodes.view(1, -1, *[1] * (t.ndim - 2))).all())

    def _fail(self, why: str, *modules: str) -> None:
        self.problem = self.problem or NotSequenceParallel(why, set(modules))

    # --------------------------------------------------------------------------------------------------- blocks

    def _enter_block(self, name: str) -> Any:
        @_unseen
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            named = _named(args, kwargs)
            if self.nodes is None:
                found = next(((k, t) for k, t in named if t.is_floating_point() and t.ndim == 3), None)
                if name != self.blocks[0] or found is None:
                    self._fail("its first block is given no (batch, sequence, width)")
                    return
                self.entry, x = found
                self.shape, self.open = tuple(x.shape), True
                if x.shape[1] < self.tp:
                    self._fail("the sequence is shorter than tp")
                self.nodes = self.tracer.trace.classes.new(x.shape[1])
                ranks = torch.cat([torch.full((len(even_shard(x.shape[1], r, self.tp)),), r) for r in range(self.tp)])
                self.recorder.layouts.owner = torch.cat((torch.full((int(self.nodes[0]),), -1), ranks))
                self._label(x)
            elif name == self.blocks[0]:
                self._fail("its blocks run more than once")
            elif not any(self.tracer.shadow(t).label is not None for _, t in named):
                self._fail("something between its blocks makes the stream whole")

        return hook

    def _leave_block(self, name: str) -> Any:
        @_unseen
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            first = _first(out)
            if first is None or tuple(first.shape) != self.shape or not self._in_place(first):
                self._fail("a block does not return the stream", *(r for r in self.regions if r.startswith(f"{name}.")))
                return
            if any(t is not first and self.tracer.shadow(t).label is not None for t in _all(out)):
                self._fail("a block returns more than the stream")
            if name == self.blocks[-1]:
                self.open, self.left = False, True
                self.tracer.put(first, TensorFacts(None, None, self.tracer.shadow(first).grad))

        return hook

    # --------------------------------------------------------------------------------------------------- regions

    def _enter_region(self, name: str) -> Any:
        @_unseen
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            region = self.regions[name]
            arriving = [(k, t) for k, t in _named(args, kwargs) if self.tracer.shadow(t).label is not None]
            arriving = [(k, t) for k, t in arriving if (starred(name), k) not in self.choices.kept]
            if any(not self._in_place(t) for _, t in arriving):
                self._fail(f"`{name}` is given tokens that do not lie along dim 1", name)
            args_now = {k: None for k, _ in arriving}
            if region.args is not None and region.args != args_now:
                self._fail(f"`{name}` is given the stream in one call, and what is whole in another", name)
            region.args = args_now
            shares = isinstance(self.styles.get(name), Colwise)
            self.gathered.update({(id(t), "" if shares else name): t for _, t in arriving})
            once = {id(t): t for _, t in arriving}.values()
            self.inside.append((region, [(t, self.tracer.shadow(t)) for t in once]))
            self.arguments = {id(t): k for k, t in arriving}
            for t in once:
                self.tracer.put(t, TensorFacts(None, None, self.tracer.shadow(t).grad))

        return hook

    def _leave_region(self, name: str) -> Any:
        @_unseen
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            region, hidden = self.inside.pop()
            for t, shadow in hidden:
                self.tracer.put(t, shadow)
            first = _first(out)
            if region.how != "return":
                if first is not None and self.tracer.shadow(first).label is not None and not self._in_place(first):
                    self._fail(f"`{name}` returns tokens that do not lie along dim 1", name)
                return
            if any(id(t) in self.terms for t in _all(out) if t is not first):
                self._fail(f"`{name}` returns sums beside its result", name)
            if first is not None and id(first) in self.terms:
                if tuple(first.shape) != self.shape:
                    self._fail(f"`{name}` returns a sum of another shape", name)
                    return
                region.summed = True
                del self.terms[id(first)]
                self._label(first)

        return hook

    # ------------------------------------------------------------------------------------------------------ sums

    def _sum_of_layer(self, name: str) -> Any:
        @_unseen
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if self.open and self._sum(out, name):
                self.sums.add(name)

        return hook

    def _sum(self, out: Tensor, module: str, along: bool = True) -> bool:
        """Ranks' terms: whether they are added up here, where dim 1 is the tokens (`along`)."""
        region = self.inside[-1][0] if self.inside else None
        if region is not None and region.how == "return":
            region.summed = region.summed or False
            self.terms[id(out)] = out
            self.deferred.add(module)
            return False
        wider = out.ndim == 3 and tuple(out.shape[:2]) == self.shape[:2]
        if not along or not (wider if region is not None and region.how == "sums" else tuple(out.shape) == self.shape):
            if region is not None:  # the code goes on with it whole, and may come to another one
                region.inner, region.wider = True, region.wider or wider
            return False
        if region is not None:
            region.summed = True
        self._label(out)
        return True

    def call(self, name: str, args: Any, kwargs: Any, out: Any, module: str, frame: Any) -> None:
        """A call of a torch function: of a sum over ranks, or on the terms of one."""
        outs, given = _all(out), _all((args, tuple(kwargs.values())))
        known = self.sum_calls[module].get((name, call_site(frame)), []) if module in self.sum_calls else []
        if any(known):
            if not all(known) or len(outs) != 1:
                self._fail(f"`{module}`: {name} sums here and not there", module)
                return
            if self._sum(outs[0], module, along=name not in CONVOLUTIONS):
                params = [p[0] for t in given if (p := self.tracer.shadow(t).param) is not None and p[0] not in self.split]
                self.call_sums[module, name, call_site(frame)] = params[0] if params else None
            return
        terms = [t for t in given if id(t) in self.terms]
        if name in ZEROS:
            self.zeros.update({id(t): t for t in outs})
        if not terms:
            if name in MOVES and given and id(given[0]) in self.zeros:
                self.zeros.update({id(t): t for t in outs})
            return
        others = [t for t in given if id(t) not in self.terms and id(t) not in self.zeros]
        linear = (
            name in MOVES
            or (name in SUMS and not others and not any(isinstance(a, (int, float)) and a for a in args))
            or (name in INTO and not [t for t in others if t.is_floating_point()] and kwargs.keys() <= {"dim", "index", "source"})
            or (name in FACTORS and len(terms) == 1)
            or (name in ("div", "__truediv__") and terms[0] is given[0] and len(terms) == 1)
            or (name == "dropout" and kwargs.get("p", args[1] if len(args) > 1 else 0.5) == 0)
        )
        floating = [t for t in outs if t.is_floating_point()]
        if not linear:
            if floating:
                self._fail(f"`{module}`: {name} of a sum that is not added up yet", module)
            return
        self.terms.update({id(t): t for t in floating})
        if name in INTO or name.endswith("_"):
            self.terms[id(given[0])] = given[0]

    def other_ways(self, args: Any, kwargs: Any, change: Any) -> None:
        """A call that can't be as it is: whether an argument of the region, or a size, were better had otherwise."""
        given = _all((args, tuple(kwargs.values())))
        tokens = [t for t in given if self.tracer.shadow(t).label is not None]
        if self.inside and tokens and len(self.inside[-1][1]) > 1:  # a residual beside what is read
            kept = {self.arguments[id(t)] for t in given if id(t) in self.arguments and self.tracer.shadow(t).label is None}
            self.otherwise.kept |= {(starred(self.inside[-1][0].name), k) for k in kept}
        if not tokens and change is not None and change.sizes:
            sizes = [n for a in (*args, *kwargs.values()) for n in (a if isinstance(a, (tuple, list)) else (a,))]
            self.otherwise.reads |= {read for n in sizes if isinstance(n, PerRankInt) for read in n.reads}

    def joined(self, module: str) -> None:
        """After a call: whether tokens met."""
        if self.problem is None and self.nodes is not None:
            parent = self.tracer.trace.classes.find(self.nodes)
            if not torch.equal(parent, self.nodes):
                self._fail("tokens meet outside attention", module)

    # ----------------------------------------------------------------------------------------------------- result

    def check(self, trace: FeatureTrace) -> None:
        """Whether all of it can be as Megatron-LM has it.

        Raises:
            CantBeInShards: if not.
        """
        unsummed = {r.name for r in self.regions.values() if r.summed is False}
        if self.problem:
            raise NotSequenceParallel(str(self.problem), self.problem.modules | unsummed, self.otherwise)
        if self.nodes is None or not self.left:
            raise NotSequenceParallel("its blocks did not run")
        if unsummed:
            raise NotSequenceParallel("a region does not return a sum", unsummed)
        self.joined("")
        if self.problem:
            raise self.problem
        if self.recorder.bad:
            why = "its code has sizes of the sequence in it, or what is whole meets tokens"
            raise NotSequenceParallel(why, self._around(self.recorder.bad), self.otherwise)
        if PerRankInt.diverging - self.choices.reads:
            raise NotSequenceParallel(
                "its code decides by the length of the sequence", self._around({read[0] for read in PerRankInt.diverging})
            )
        summed = len(self.sums) + len(self.call_sums) + sum(r.how == "return" and bool(r.summed) for r in self.regions.values())
        if len(self.blocks) < LEAST_BLOCKS or not summed:
            raise NotSequenceParallel(
                f"{summed} sums over ranks in {len(self.blocks)} blocks: at its ends it is gathered once more"
            )
        if len(self.gathered) > summed:
            raise NotSequenceParallel(f"the stream would be gathered {len(self.gathered)} times for {summed} sums")

    def _around(self, modules: set[str]) -> set[str]:
        """These, and the regions of the blocks whose own code it is."""
        of = {r for m in modules if m in self.blocks for r in self.regions if r.startswith(f"{m}.")}
        return modules | ({r for r in of if self.regions[r].inner and not self.regions[r].summed} or of)

    def found(self, trace: FeatureTrace) -> SequencePlan:
        """What has to be done."""
        recorder = self.recorder
        names = {*trace.local_uses, *recorder.on_tokens}
        on_tokens = {n: trace.local_uses.get(n, set()) | recorder.on_tokens.get(n, set()) for n in names}
        on_whole = {
            n: (trace.whole_uses.get(n, set()) - recorder.made_in.get(n, set())) | recorder.on_whole.get(n, set()) for n in names
        }
        for (module, _, _), bias in self.call_sums.items():
            if bias is not None:
                on_tokens.setdefault(bias, set()).add(module)
        reads: dict[str, list[Call]] = {}
        for module, calls in recorder.found.calls.items():
            places = {(c.name, c.at) for c in calls if c.name in READS and c.sizes}
            for c in calls:
                if (c.name, c.at) in places:
                    sizes = tuple(tuple((at, 0, -1) for at, _, _ in of) for of in c.sizes)
                    if any(at != 1 for of in c.sizes for at, _, _ in of):
                        raise NotSequenceParallel(f"`{module}` reads the length of the sequence along another dim than 1", {module})
                    reads.setdefault(module, []).append(replace(c, sizes=sizes))
        return SequencePlan(
            self.blocks, self.entry, self.regions, self.sums, self.deferred, self.call_sums, on_tokens, on_whole, reads
        )


def _along(nodes: Tensor, t: Tensor) -> Tensor:
    return nodes.view(1, -1, *[1] * (t.ndim - 2)).expand(t.shape)


def _named(args: Any, kwargs: Any) -> list[tuple[Arg, Tensor]]:
    pairs: list[tuple[Arg, Any]] = [*enumerate(args), *kwargs.items()]
    return [(k, t) for k, t in pairs if isinstance(t, Tensor)]


def _first(out: Any) -> Tensor | None:
    if isinstance(out, Tensor):
        return out
    if isinstance(out, (tuple, list)) and out and isinstance(out[0], Tensor):
        return out[0]
    return None


def _all(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, (tuple, list)):
        return [t for o in out for t in _all(o)]
    return []
