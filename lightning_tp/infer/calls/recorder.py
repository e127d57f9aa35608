"""Run a model once more, with an owner for each feature, and record what has to change in its calls on a rank.

Every dim of every activation has a layout by now: equal on all ranks, or sharded. A call of a torch function is right on a rank's shards as it
stands, or one of a few things has to change: a size that the code hard-codes, the bounds of a slice, an operand that every rank has whole
(`changes.py`). Sizes that code reads from shards are followed as pairs of full and local numbers, so that only real differences count.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_tp._compat import intercept_functions, unobserved
from lightning_tp.core.modules.call_site import call_site
from lightning_tp.core.modules.snapshot import preserve_modules
from lightning_tp.core.trees import tensors_in
from lightning_tp.infer.calls.changes import change_of, factors, full_sizes
from lightning_tp.infer.calls.layouts import Layout, Layouts, OnRanks
from lightning_tp.infer.calls.local_sizes import LocalShape, PerRankInt, per_rank_ints, plain
from lightning_tp.infer.calls.recorded_call import Change, Given, NotOnShards, RecordedCall, tensors_given
from lightning_tp.infer.follow.features import gradient_is_partial, shrunk
from lightning_tp.infer.follow.gradients import ABOUT_GRADIENTS
from lightning_tp.infer.follow.ops import MOVES, ON_EACH_ELEMENT, READS_VALUES, writes_in_place
from lightning_tp.infer.follow.run import cross_entropy, run
from lightning_tp.infer.follow.trace import FeatureTrace
from lightning_tp.infer.follow.tracer import FeatureTracer
from lightning_tp.styles.calls.call import COUNTS, FACTORIES, READS, SIZE_CALLS, Call, Operand, Path


@dataclass
class CallChanges:
    """What a recording found."""

    calls: dict[str, list[Call]] = field(default_factory=dict)  # module -> calls that change, and those beside them that do not
    broken: list[tuple[Tensor, str]] = field(default_factory=list)  # labels of features that a call needs together, and why
    failed: dict[str, str] = field(
        default_factory=dict
    )  # modules with a call that can't work beside shards, though it is given none; why
    local_uses: dict[str, set[str]] = field(default_factory=dict)  # as of `FeatureTrace`, where ranks do have different elements
    mixed: set[str] = field(default_factory=set)  # parameters whose gradient is all-reduced where they are used
    trace: FeatureTrace | None = None  # of the run


class CallRecorder(TorchFunctionMode):
    """See every call of a torch function, with the layouts of what goes in and out.

    Args:
        tracer: of the run; this and `owner`, `tp` and `nodes`: as of `Layouts`.
        standard: names of modules that a style runs: calls in them are not recorded.
        heads: parameter -> vocabulary, of those used outside of a standard module whose result stays split for the loss.
        whole_reads: (module, function, call site) where code that reads a size has to be given the full one.

    A caller may set `mixed`, `outside`, `tables` and `tried` before the run.
    """

    remakes = (
        False  # whether a tensor that every rank has all of may be made with sizes read from shards; full ones are given, then
    )

    def __init__(
        self,
        tracer: FeatureTracer,
        owner: Tensor,
        tp: int,
        standard: set[str],
        heads: dict[str, int],
        nodes: dict[tuple[str, int], Tensor],
        whole_reads: set[Any],
    ) -> None:
        super().__init__()
        self.tracer, self.tp, self.standard, self.heads, self.whole_reads = tracer, tp, standard, heads, whole_reads
        self.layouts = Layouts(tracer, owner, tp, nodes)
        self.mixed: set[str] = set()  # parameters also used with equal activations: their partial gradients are all-reduced at once
        self.outside: set[str] = set()  # parameters of which only what is computed from them is combined with shards
        self.tables: set[str] = set()  # modules that look up rows of a split table on their own
        self.split: Mapping[str, str] = {}  # parameters that are split -> the weight that has their features
        self.tried: set[Any] = set()  # calls that were found right on shards before
        self.found = CallChanges()
        self.local_reads: set[Any] = set()  # where code was given the sizes of a shard
        self.uneven = False  # whether these are not the same on all ranks
        # of the call that runs: sizes of shards among its arguments, and what the tensors were that it writes into
        self._numbers: tuple[PerRankInt, ...] = ()
        self._before: dict[int, OnRanks] = {}
        self._opaque: str | None = None  # the module whose code called the `autograd.Function` that runs
        self._ran_modules = False  # whether modules run in it
        tracer.log = []
        PerRankInt.diverging = set()

    def __enter__(self) -> CallRecorder:
        self._undo = intercept_functions(self._apply)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._undo()

    def _apply(self, cls: Any, apply: Callable[..., Any], args: Any, frame: Any) -> Any:
        """Record an `autograd.Function` as one call: its forward is no code that could run with other sizes than its backward."""
        module = self.tracer.stack[-1]
        if self._opaque is not None or module in self.standard:
            return apply(*args)
        self.tracer.events, self._before = [], {}
        self._opaque, self._ran_modules = module, False
        try:
            out = apply(*plain(args))
            self._numbers = per_rank_ints(args)
            with unobserved():
                self.analyse_call("apply", cls.apply, args, {}, out, module, frame)
        finally:
            self._opaque = None
        for n in self._numbers:
            n.computed_with()
        return out

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._opaque is not None:
            if self.tracer.stack[-1] == self._opaque:
                return func(*args, **kwargs)
            self._ran_modules = True
        name = getattr(func, "__name__", "")
        frame = sys._getframe(1)
        if name in READS:
            if (name != "__get__" or func.__self__ is Tensor.shape) and self._may_be_local(name, args[0], frame):
                with unobserved():
                    return self._read(func, name, args, kwargs, frame)
            if name == "__get__":
                return func(*args, **kwargs)
        plain_args, plain_kwargs = plain(args), plain(kwargs)
        if func in ABOUT_GRADIENTS:
            return func(*plain_args, **plain_kwargs)
        if func is torch.nn.functional.cross_entropy:
            return cross_entropy(self.tracer, plain_args, plain_kwargs)
        self.tracer.events = []
        module = self.tracer.stack[-1]
        self._before = {}
        if writes_in_place(name, kwargs):
            with unobserved(), torch.no_grad():
                self._before = {id(t): OnRanks(t.clone(), self.layouts.of(t)) for _, t in tensors_given(args, kwargs)}
        out = func(*plain_args, **plain_kwargs)
        self._numbers = per_rank_ints((args, kwargs))
        if module == self.tracer.stack[-1] and module not in self.standard:
            with unobserved(), torch.no_grad():
                self.analyse_call(name, func, args, kwargs, out, module, frame)
        for n in self._numbers:  # not known for sizes: numbers that code computes with
            n.computed_with()
        return out

    def _may_be_local(self, name: str, t: Tensor, frame: Any) -> bool:
        """Return whether a size may differ on a rank; or is full, and read in a loop where others are given the full size."""
        if self.layouts.may_be_local(t):
            return True
        return bool(self.whole_reads) and (self.tracer.stack[-1], name, call_site(frame)) in self.whole_reads

    def _read(self, func: Any, name: str, args: Any, kwargs: Any, frame: Any) -> Any:
        """Return pairs of full and local sizes for `x.shape`, `x.size()`; full ones where code decides or computes by them."""
        x, module, site = args[0], self.tracer.stack[-1], call_site(frame)
        read = (module, name, site)
        local = self.layouts.sizes(x)
        if read in self.whole_reads:
            sizes = factors([((n,) * self.tp, of) for n, of in zip(x.shape, local, strict=True)], self.tp)
            self._note(module, Call(name, site, sizes=sizes), always=True)
            return func(*args, **kwargs)
        if name in COUNTS:
            counts = local[0] if name == "__len__" else tuple(math.prod(n) for n in zip(*local, strict=True))
            shape = LocalShape((PerRankInt.of(func(*args, **kwargs), counts, frozenset([read])),))
        else:
            shape = LocalShape(PerRankInt.of(n, of, frozenset([read])) for n, of in zip(x.shape, local, strict=True))
        for n in per_rank_ints(shape):
            self.local_reads.add(read)
            self.uneven |= len(set(n.local)) > 1
        if name in COUNTS:
            return shape[0]
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        return shape if dim is None or name != "size" else shape[dim]

    def analyse_call(self, name: str, func: Any, args: Any, kwargs: Any, out: Any, module: str, frame: Any) -> None:
        """Note what has to change in a call on a rank, or which features it needs together."""
        if PerRankInt.shown is not None:
            return
        call = self._recorded(name, func, args, kwargs, out, module, call_site(frame))
        try:
            change = self._decide(call)
        except NotOnShards as no:
            self._set_known(no.sizes)
            together = self._kept_together(call, no)
            self.found.broken += [(features, f"`{name}` in `{module or 'the model'}`: {no}") for features in together]
            if not any(bool(shrunk(features).any()) for features in together):
                self.found.failed.setdefault(module, f"`{name}`: {no}")
            return
        if change is not None:
            self._set_known(change.sizes)
            self._note(module, change.call)

    def _decide(self, call: RecordedCall) -> Change | None:
        if call.name in READS_VALUES and any(self.layouts.is_followed(g.tensor) for g in call.given):
            raise NotOnShards("code reads its values")
        tables = [g.tensor for g in call.given if g.is_split]
        if call.name == "embedding" and call.module not in self.tables and tables:
            raise NotOnShards("it looks up rows of a split table", tables)
        if read := self._parameters_read(call):
            return self._read_in_full(call, read)
        if call.is_involved or len(call.products) > 1:
            change = change_of(call, self.layouts, self.tried)
            if change.call.changes and (not call.site or len(self.tracer.stack) == 1):
                raise NotOnShards("it would have to change, but is in no module's forward")
            return change
        if self.remakes and call.name in SIZE_CALLS | FACTORIES and call.results:
            return full_sizes(call)
        return Change(call.unchanged)

    def _read_in_full(self, call: RecordedCall, read: list[Given]) -> Change:
        """Give a call all of the split parameters that it reads."""
        if len(self.tracer.stack) == 1:
            return Change(call.unchanged)  # there, code sees parameters in full
        frozen = call.name in ON_EACH_ELEMENT and not any(g.facts.grad for g in read)
        if frozen or any(id(g.tensor) not in self.tracer.names for g in read):
            self._keep_as_shards(call, read)
            return Change(call.unchanged)
        operands = tuple(Operand(g.path, full=tuple(g.tensor.shape)) for g in read)
        return Change(replace(call.unchanged, operands=operands))

    def _parameters_read(self, call: RecordedCall) -> list[Given]:
        """Return the split parameters that a call reads beside products and shards: a norm of weights."""
        read = [g for g in call.given if g.facts.param is not None and g.facts.param.name in self.split]
        if not read or call.products or call.before or call.name == "embedding" or not call.results:
            return []
        others = [x for x in (*call.given, *call.results) if not any(x is g for g in read)]
        facts = [self.tracer.shadow(x.tensor) for x in others]
        beside = any(f.label is not None for f in facts) or any(not x.tensor.numel() for x in others)
        moved = any(self.tracer.shadow(x.tensor).param is not None for x in call.results)
        return [] if beside or moved else read

    def _keep_as_shards(self, call: RecordedCall, read: list[Given]) -> None:
        """Follow a pointwise function of what was read from parameters that are split alike: `k.data * 0.9 + q.data * 0.1` is a shard, too.

        Raises:
            NotOnShards: for any other function.
        """
        ranks = [self._ranks(g) for g in read]
        alike = all(r.shape == ranks[0].shape and torch.equal(r, ranks[0]) for r in ranks)
        others = [g for g in call.given if g.tensor.ndim and not any(g is r for r in read)]
        if (
            call.name not in ON_EACH_ELEMENT
            or others
            or not alike
            or any(r.tensor.shape != read[0].tensor.shape for r in call.results)
        ):
            raise NotOnShards("it reads a part of a split parameter", [g.tensor for g in read])
        for r in call.results:
            self.tracer.put(r.tensor, replace(read[0].facts, grad=any(g.facts.grad for g in read)))

    def _ranks(self, g: Given) -> Tensor:
        """Return the rank of each element of what was read from a split parameter."""
        assert g.facts.param is not None
        name, coordinates = g.facts.param
        weight, dim = next(key for key in self.layouts.nodes if key[0] == self.split[name])
        along = coordinates[dim if name == weight or len(coordinates) > 1 else 0]
        return self.layouts.param_owner[self.layouts.nodes[weight, dim][shrunk(along)]]

    def _kept_together(self, call: RecordedCall, no: NotOnShards) -> list[Tensor]:
        """Return the features that a call that can't run on shards needs together."""
        if len(call.products) > 1:
            return [nodes for _, parameter in call.products for nodes in self.layouts.features_of(parameter)]
        if no.tensors is not None:
            return [self.layouts.features(t) for t in no.tensors]
        followed = [g.tensor for g in call.given if self.layouts.is_followed(g.tensor)]
        return [self.layouts.features(t) for t in followed[:1]] or [self.tracer.label(call.results[0].tensor)]

    def _set_known(self, sizes: tuple[PerRankInt, ...]) -> None:
        """Note that these numbers are known for sizes, so that code need not read full ones for them."""
        known = {id(n) for n in sizes}
        self._numbers = tuple(n for n in self._numbers if id(n) not in known)

    def _note(self, module: str, call: Call, *, always: bool = False) -> None:
        """Note a call; one in which nothing changes counts the turns of a call site at which others may change."""
        if always or call.changes or call.name not in ("", "__get__"):
            self.found.calls.setdefault(module, []).append(call)

    def _recorded(self, name: str, func: Any, args: Any, kwargs: Any, out: Any, module: str, site: Any) -> RecordedCall:
        runs_modules = name == "apply" and self._ran_modules
        products = () if runs_modules else tuple(dict.fromkeys(self.tracer.events))
        results = tuple(OnRanks(t, self._layout(name, t)) for t in tensors_in(out, depth=0))
        return RecordedCall(
            name=name,
            func=func,
            args=args,
            kwargs=kwargs,
            site=site,
            module=module,
            given=tuple(self._given(name, path, t) for path, t in tensors_given(args, kwargs)),
            results=results,
            before=self._before,
            products=products,
            vocabulary=self.heads.get(dict(products).get("out", "")),
            partial_results=any(r.tensor.numel() and gradient_is_partial(self.tracer.shadow(r.tensor).label) for r in results),
            tp=self.tp,
            runs_modules=runs_modules,
        )

    def _given(self, name: str, path: Path, t: Tensor) -> Given:
        facts = self.tracer.shadow(t)
        inside = facts.param is not None and facts.param.name in self.outside and facts.grad
        return Given(t, self._layout(name, t), path, facts, self.layouts.is_split(facts), self.has_equal_gradient(t), inside)

    def _layout(self, name: str, t: Tensor) -> Layout:
        """Return the layout of a tensor; None for a parameter that is not just moved, since a rank has its shard already."""
        return None if self.tracer.shadow(t).param is not None and name not in MOVES else self.layouts.of(t)

    def has_equal_gradient(self, t: Tensor) -> bool:
        """Return whether a tensor's gradient is equal on all ranks, so that partial ones have to be all-reduced."""
        facts = self.tracer.shadow(t)
        is_activation = facts.param is None or facts.param.name in self.mixed
        return facts.label is None and is_activation and facts.grad and (t.is_floating_point() or t.is_complex())


def untracked_size_reads(
    model: Any, call: Any, inputs: Any, whole: Any, shared: Any, make: Any, once: Any, recorder: CallRecorder, tracer: FeatureTracer
) -> set[Any]:
    """Return the reads of sizes of shards by which code computes in ways that can't be seen: `range(n)`, an index into a list.

    The model runs once more (see `run`; `once` is its `during`) with the numbers that a rank's code would have, where numbers that are known for
    sizes are full again. What still has another result than in the run of `recorder` and `tracer` is not known for a size.

    Returns:
        Those around the first operation that differs; nothing if none does.
    """
    if not recorder.local_reads:
        return set()
    before = PerRankInt.diverging
    for rank in (0, recorder.tp - 1) if recorder.uneven else (0,):
        PerRankInt.shown = rank
        try:
            with preserve_modules(model):
                _, _, again = run(model, call, inputs, whole, shared, make, during=once)
            log = again.log or []
        except Exception:  # no code that runs with these
            log = []
        finally:
            PerRankInt.shown, PerRankInt.diverging = None, before
        pairs = itertools.zip_longest(tracer.log or [], log)
        other = next((a or b for a, b in pairs if a != b), None)
        if other is not None:
            near = {r for r in recorder.local_reads if log and _is_around(r[0], other[0])}
            return near or recorder.local_reads
    return set()


def _is_around(a: str, b: str) -> bool:
    """Return whether one of two modules contains the other."""
    return not a or not b or f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")
