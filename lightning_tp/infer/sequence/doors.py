"""Where an activation enters and leaves sequence shards, and what the plan says there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tp.core.comm.state import SEQUENCE, WIDTH, I, P, R, State
from lightning_tp.infer.calls.recorder import CallChanges
from lightning_tp.infer.follow.features import shrunk
from lightning_tp.infer.follow.trace import TensorFacts
from lightning_tp.infer.follow.tracer import FeatureTracer
from lightning_tp.infer.repeats import Alike, followed, for_all
from lightning_tp.infer.sequence.stream import NotSequenceParallel, SequencePlan, _Region
from lightning_tp.infer.sequence.tokens import _first, _named, _unseen
from lightning_tp.plan.plan import Plan
from lightning_tp.plan.rule import Rule
from lightning_tp.styles import Colwise, PrepareInput, PrepareOutput, Replicate, RewrittenCalls, Rowwise, Sequence
from lightning_tp.styles.calls.call import Call

Doors = Callable[[FeatureTracer], None]


Replan = Callable[[Doors], tuple[Plan, CallChanges]]


def _expanded(plan: Plan, model: nn.Module) -> list[Rule]:
    everything = [n for n, _ in model.named_modules(remove_duplicate=False)]
    everything += [n for n, _ in model.named_parameters(remove_duplicate=False)]
    exactly = set(everything)
    return [
        Rule(n, r.style, r.reason)
        for r in plan.rules
        if r.pattern != "**"
        for n in ([r.pattern] if r.pattern in exactly else everything)
        if r.matches(n)
    ]


class _Doors:
    """Puts labels at the doors of regions, while features are followed: inside, every rank has the stream, with a share of its gradient."""

    def __init__(self, model: nn.Module, rules: list[Rule], cuts: list[SequencePlan]) -> None:
        self.model, self.cuts = model, cuts
        self.columns = {r.pattern: r.style for r in rules if isinstance(r.style, Colwise)}
        self.handles: list[Any] = []
        self.reads: dict[str, set[State]] = {}
        self.problem: str | None = None

    @contextmanager
    def closed_after(self) -> Iterator[_Doors]:
        """Take the hooks away in the end."""
        try:
            yield self
        finally:
            self.close()

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def open(self, tracer: FeatureTracer) -> None:
        """For one run."""
        self.close()
        self.reads.clear()
        tracer.gathered = True
        running: list[int] = []
        hidden: dict[str, list[tuple[Tensor, TensorFacts]]] = {}

        def whole(t: Tensor) -> None:
            tracer.put(t, TensorFacts(None, None, tracer.shadow(t).grad))

        def begin(cut: int) -> Any:
            @_unseen
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                if running:
                    self.problem = "two streams take turns"  # the axis remembers the length of one
                running.append(cut)

            return hook

        def enter(region: _Region) -> Any:
            @_unseen
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                given = {id(t): t for k, t in _named(args, kwargs) if k in (region.args or ())}.values()
                hidden[region.name] = [(t, tracer.shadow(t)) for t in given]
                for t in given:
                    tracer.put(t, TensorFacts(torch.zeros((), dtype=torch.int64).expand(t.shape), None, tracer.shadow(t).grad))
                tracer.deferring = region.how == "return" and bool(region.summed)

            return hook

        def leave(region: _Region) -> Any:
            @_unseen
            def hook(module: nn.Module, args: Any, out: Any) -> None:
                tracer.deferring = False
                for t, shadow in hidden.pop(region.name, []):
                    tracer.put(t, shadow)
                if region.how == "return" and region.summed and (first := _first(out)) is not None:
                    whole(first)

            return hook

        def read(name: str) -> Any:
            @_unseen
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                label = tracer.shadow(args[0]).label if args else None
                self.reads.setdefault(name, set()).add(I if label is None else WIDTH if bool(shrunk(label).any()) else R)

            return hook

        for i, cut in enumerate(self.cuts):
            self._hook(cut.blocks[0], begin(i), None)
            self._hook(cut.blocks[-1], None, lambda *_: (running.pop() if running else None, None)[1])
            for region in cut.regions.values():
                self._hook(region.name, enter(region), leave(region))
        for name, style in self.columns.items():
            gathered = _unseen(lambda m, a, out: whole(out)) if style.output == I else None
            self._hook(name, read(name), gathered)

    def _hook(self, name: str, enter: Any, leave: Any) -> None:
        module = self.model.get_submodule(name)
        if enter is not None:
            self.handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        if leave is not None:
            self.handles.append(module.register_forward_hook(leave))


def _with_cuts(model: nn.Module, rules: list[Rule], cuts: list[SequencePlan], replan: Replan, alike: Alike) -> Plan:
    """The plan with these streams in shards.

    Raises:
        CantBeInShards: if the code in the regions can't work on a stream that it has a share of the gradient of.
    """
    regions = {n: r for cut in cuts for n, r in cut.regions.items()}
    with _Doors(model, rules, cuts).closed_after() as doors:
        plan, found = replan(doors.open)
        reads = dict(doors.reads)
        if doors.problem:
            raise NotSequenceParallel(doors.problem)
    assert found.trace is not None
    if found.trace.leaked_partial:
        raise NotSequenceParallel("a share of a gradient meets what is whole", set(found.trace.leaked_partial))
    sums, terms = {n for cut in cuts for n in cut.sums}, {n for cut in cuts for n in cut.terms}
    call_sums = {key: bias for cut in cuts for key, bias in cut.call_sums.items()}
    reads_of = {m: _alike(calls) for cut in cuts for m, calls in cut.reads.items()}
    direct = {n for n, r in regions.items() if n in reads and reads[n] == {R} and len(r.args or ()) == 1}
    new: list[Rule] = []
    for rule in _expanded(plan, model):
        if followed(rule.pattern, alike) != rule.pattern:
            continue
        style, name = rule.style, rule.pattern
        if isinstance(style, Colwise) and (how := reads.get(name, {I})) != {I}:
            if how != {R}:
                raise NotSequenceParallel(f"`{name}` reads the stream and what is whole", {name})
            style = replace(style, input=SEQUENCE if name in direct else R)
        elif isinstance(style, Rowwise) and name in sums | terms:
            style = replace(style, output=SEQUENCE if name in sums else P)
        elif isinstance(style, RewrittenCalls):
            inside = any(name == r or name.startswith(f"{r}.") for r, of in regions.items() if of.how == "return" and of.summed)
            to: State = P if inside else I
            style = replace(
                style,
                calls=tuple(
                    replace(c, to=SEQUENCE if (name, c.name, c.at) in call_sums else to) if c.leave else c for c in style.calls
                ),
            )
            if name in reads_of:
                both = {(c.name, c.at) for c in style.calls} & {(c.name, c.at) for c in reads_of[name]}
                if both:
                    raise NotSequenceParallel(f"`{name}` reads sizes of tokens and of features by one call", {name})
                style = replace(style, calls=(*style.calls, *reads_of.pop(name)))
        new.append(Rule(name, style, rule.reason))
    new += [Rule(name, RewrittenCalls(tuple(calls)), "the length of the sequence in its code") for name, calls in reads_of.items()]
    for cut in cuts:
        new += _moves(cut, direct)
    new += _on_tokens(model, new, cuts, found)
    new = [r for r in new if r.pattern in alike or followed(r.pattern, alike) == r.pattern]  # doors of blocks are their own
    return Plan([*for_all(new, alike), *(r for r in plan.rules if r.pattern == "**")], plan.source)


def _alike(calls: list[Call]) -> tuple[Call, ...]:
    """Calls from one place in turn; one of them, where they are all alike."""
    by_place: dict[Any, list[Call]] = {}
    for c in calls:
        by_place.setdefault((c.name, c.at), []).append(c)
    return tuple(c for of in by_place.values() for c in (of[:1] if all(c == of[0] for c in of) else of))


def _moves(cut: SequencePlan, direct: set[str]) -> Iterator[Rule]:
    """What crosses the ranks at the doors of blocks and regions."""
    yield Rule(
        cut.blocks[0],
        PrepareInput(arrives=I, wanted=SEQUENCE, arg=cut.entry),
        "the stream is cut into tokens here",
    )
    for region in cut.regions.values():
        for arg in (region.args or ()) if region.name not in direct else ():
            yield Rule(region.name, PrepareInput(arrives=SEQUENCE, wanted=R, arg=arg), "gathered once for all in it")
        if region.how == "return" and region.summed:
            yield Rule(region.name, PrepareOutput(arrives=P, wanted=SEQUENCE), "the ranks' terms are summed once")
    yield Rule(cut.blocks[-1], PrepareOutput(arrives=SEQUENCE, wanted=I), "and gathered here")


def _on_tokens(model: nn.Module, rules: list[Rule], cuts: list[SequencePlan], found: CallChanges) -> Iterator[Rule]:
    """Parameters that work on this rank's tokens: their gradient is a share.

    Raises:
        CantBeInShards: for one that works on what is whole, too.
    """
    assert found.trace is not None
    ruled = {r.pattern: r.style for r in rules if r.style.splits_parameters}
    local, whole = found.trace.local_uses, found.trace.whole_uses
    on_tokens: dict[str, set[str]] = {}
    for cut in cuts:
        for n, modules in cut.on_tokens.items():
            on_tokens.setdefault(n, set()).update(modules)
    for n in {*on_tokens, *local}:
        rule = next((s for r, s in ruled.items() if n == r or n.startswith(f"{r}.")), None)
        if rule is not None and not isinstance(rule, Replicate):
            continue
        here = on_tokens.get(n, set())
        twice = {m for cut in cuts for m in cut.on_whole.get(n, ()) if m in here and m in whole.get(n, ())}
        if (whole.get(n, set()) - here or twice) and (here or n not in found.mixed):
            raise NotSequenceParallel(f"`{n}` works on the stream and on what is whole", here)
    for cut in cuts:
        for block in cut.blocks:
            inside = [n for n, _ in model.get_submodule(block).named_parameters(prefix=block)]
            mine = [n for n in inside if n in on_tokens and not any(n == r or n.startswith(f"{r}.") for r in ruled)]
            for owner in dict.fromkeys(n.rpartition(".")[0] for n in mine):
                all_of_it = {n for n in inside if n.startswith(f"{owner}.")}
                together = owner != block and all_of_it <= set(mine)
                for n in [owner] if together else [n for n in mine if n.rpartition(".")[0] == owner]:
                    yield Rule(n, Sequence(), "works on this rank's tokens")
