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
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tp.comm import State, even_shard
from lightning_tp.fsdp import find_blocks
from lightning_tp.infer.classes import shrunk
from lightning_tp.infer.record import Found, Recorder, computed_unseen
from lightning_tp.infer.repeats import Alike, followed, for_all
from lightning_tp.infer.sizes import LocalInt
from lightning_tp.infer.trace import Shadow, Trace, Tracer, _untraced, leaves, run
from lightning_tp.plan import Plan, Rule
from lightning_tp.plan_table import starred
from lightning_tp.styles import Colwise, PrepareInput, PrepareOutput, Replicate, Rowwise, Sequence
from lightning_tp.styles.local_ops import CONVOLUTIONS, READS, Call, LocalOps, place

Arg = int | str
Doors = Callable[[Tracer], None]
Replan = Callable[[Doors], tuple[Plan, Found]]

MOST_RUNS = 12  # of the model, for one stream
LEAST_BLOCKS = 2  # that follow each other: at the ends of a stream it is gathered once more
STEPS = ("sum", "sums", "return", "open")  # what is tried for a region, in this order
# on terms of a sum over ranks: what moves them, what is linear in them, what begins as zeros
MOVES = {
    *(
        "view",
        "reshape",
        "transpose",
        "permute",
        "contiguous",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "to",
        "type",
        "float",
    ),
    *(
        "half",
        "bfloat16",
        "type_as",
        "clone",
        "expand",
        "chunk",
        "split",
        "__getitem__",
        "index_select",
        "unbind",
        "narrow",
        "view_as",
    ),
    *("__get__", "sum", "mean", "movedim", "swapaxes", "reshape_as", "identity"),
}
SUMS = {"add", "__add__", "__radd__", "add_", "__iadd__", "sub", "__sub__", "sub_", "__isub__", "cat", "stack"}
INTO = {"index_add", "index_add_", "scatter_add", "scatter_add_", "__setitem__", "index_put_", "copy_"}
FACTORS = {"mul", "__mul__", "__rmul__", "mul_", "__imul__", "einsum", "matmul", "bmm", "__matmul__"}
ZEROS = {"zeros", "zeros_like", "new_zeros"}


class CantBeInShards(Exception):
    """The stream stays whole, and why; and the modules whose code it is, or what could be had otherwise."""

    def __init__(self, why: str, modules: set[str] | None = None, otherwise: _Choices | None = None) -> None:
        super().__init__(why)
        self.modules, self.otherwise = modules or set(), otherwise or _Choices()


@dataclass
class _Choices:
    """What is had in another way than the most usual one.

    Args:
        steps: name of a region, numbers as stars -> how far it has come in STEPS.
        kept: (region, argument) that is taken in shards: a residual that is added inside.
        reads: places where the code reads the length of the sequence for what is whole.
    """

    steps: dict[str, int] = field(default_factory=dict)
    kept: set[tuple[str, Arg]] = field(default_factory=set)
    reads: set[Any] = field(default_factory=set)


@dataclass
class _Region:
    """A module that is entered with the whole stream.

    Args:
        name: of the module.
        how: where the ranks' terms are added up: "sum", where they are made ("sums": also those of another width than the stream), or
            "return", when the module returns.
        args: by which the stream arrives; None if it never ran.
        summed: whether its terms are added up; None if it makes none.
        inner: whether some are whole inside: of another shape than the stream; and whether only the width differs.
    """

    name: str
    how: str
    args: dict[Arg, None] | None = None
    summed: bool | None = None
    inner: bool = False
    wider: bool = False


@dataclass
class _Cut:
    """A stream that can be in shards."""

    blocks: list[str]
    entry: Arg | None
    regions: dict[str, _Region]
    sums: set[str]  # row-wise layers, and (module, function, place) of calls, that are summed where they stand
    terms: set[str]  # those whose terms are summed when their region returns
    call_sums: dict[tuple[str, str, Any], str | None]  # and the bias that is added to the sum
    on_tokens: dict[str, set[str]]  # parameter -> modules where it meets tokens
    on_whole: dict[str, set[str]]  # parameter -> modules where it meets something else
    reads: dict[str, list[Call]]  # module -> where its code reads sizes, of which some are to be whole


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
    cuts: list[_Cut] = []
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
    cuts: list[_Cut],
    replan: Replan,
    once: Any,
    alike: Alike,
) -> tuple[Plan, list[_Cut]] | None:
    """The plan with one more stream in shards; None if it has to stay whole."""
    choices = _Choices()
    steps = choices.steps
    regions: dict[str, _Region] = {}
    for _ in range(MOST_RUNS):
        try:
            regions = {r.name: r for b in blocks for r in _regions(model, rules, b, steps)}
            cut = _cut(model, call, inputs, rules, blocks, tp, regions, choices, once)
            return _with_cuts(model, rules, [*cuts, cut], replan, alike), [*cuts, cut]
        except CantBeInShards as no:
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


# ------------------------------------------------------------------------------------------------------- tokens followed


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
) -> _Cut:
    """Follow the tokens through the blocks.

    Raises:
        CantBeInShards: where they do not stay apart.
    """
    names = {n for n, _ in model.named_parameters()}
    everything = {(n, d) for n in names for d in range(8)}
    made: list[_Stream] = []

    def recorder(tracer: Tracer) -> Recorder:
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
        unseen = computed_unseen(model, call, inputs, everything, {}, recorder, once, stream.recorder, tracer)
    finally:
        for again in made[1:]:
            again.close()
    if unseen:
        raise CantBeInShards("its code computes with the length of the sequence", stream._around({read[0] for read in unseen}))
    if any(label is not None and bool(label.any()) for label in (tracer.shadow(t).label for t in leaves(out))):
        raise CantBeInShards("tokens in shards leave the model")
    split = [r.pattern for r in rules if r.style.splits_parameters and not isinstance(r.style, Replicate)]
    if of := [m for n, m in trace.local_uses.items() if any(n == s or n.startswith(f"{s}.") for s in split)]:
        raise CantBeInShards("a layer that is split reads tokens in shards", set.union(*of))
    if not all(any(n.startswith(f"{b}.") for b in blocks) for n in trace.local_uses):
        raise CantBeInShards("something between the blocks works on tokens in shards")
    return stream.found(trace)


def _unseen(hook: Callable[..., None]) -> Callable[..., None]:
    """What a hook reads is not what the code reads."""

    @wraps(hook)
    def quiet(*args: Any) -> None:
        with torch._C.DisableTorchFunction(), _untraced():
            hook(*args)

    return quiet


class _Tokens(Recorder):
    """Sees the calls between the regions, where a token may meet itself and parameters only."""

    remakes = True

    def __init__(self, stream: _Stream, tracer: Tracer, tp: int) -> None:
        super().__init__(tracer, torch.full((1,), -1), tp, set(), {}, {}, stream.choices.reads)
        self.stream = stream
        self.made_of: dict[int, tuple[Tensor, set[str]]] = {}  # tensors that are computed from parameters alone: 1 + weight
        self.made_in: dict[str, set[str]] = {}  # parameter -> modules that compute such tensors of it
        self.on_tokens: dict[str, set[str]] = {}
        self.on_whole: dict[str, set[str]] = {}
        self.bad: set[str] = set()  # modules with a call that can't be as it is

    def _look(self, name: str, func: Any, args: Any, kwargs: Any, out: Any, module: str, frame: Any) -> None:
        if not self.stream.open:
            return
        self._follow_parameters(args, kwargs, out, module)
        self.stream.call(name, args, kwargs, out, module, frame)
        before = len(self.found.broken)
        super()._look(name, func, args, kwargs, out, module, frame)
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

    def _enters(self, t: Tensor) -> bool:
        return id(t) not in self.made_of and super()._enters(t)


class _Stream:
    """Follows the tokens of one stream through a run: hooks at the doors of its blocks and regions."""

    def __init__(
        self,
        model: nn.Module,
        tracer: Tracer,
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
        self.problem: CantBeInShards | None = None
        self.choices, self.otherwise = choices, _Choices()
        self.recorder = _Tokens(self, tracer, tp)
        self.inside: list[tuple[_Region, list[tuple[Tensor, Shadow]]]] = []  # regions that run, and what is whole in them
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
            if isinstance(rule.style, LocalOps):
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
        self.tracer.put(t, Shadow(_along(self.nodes, t), None, self.tracer.shadow(t).grad))

    def _in_place(self, t: Tensor) -> bool:
        """Whether dim 1 is the tokens, and nothing else is."""
        label = self.tracer.shadow(t).label
        if label is None or self.nodes is None or t.ndim < 2 or t.shape[1] != self.nodes.numel():
            return False
        small = shrunk(label)
        return bool((small == self.nodes.view(1, -1, *[1] * (t.ndim - 2))).all())

    def _fail(self, why: str, *modules: str) -> None:
        self.problem = self.problem or CantBeInShards(why, set(modules))

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
                self.recorder.owner = torch.cat((torch.full((int(self.nodes[0]),), -1), ranks))
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
                self.tracer.put(first, Shadow(None, None, self.tracer.shadow(first).grad))

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
                self.tracer.put(t, Shadow(None, None, self.tracer.shadow(t).grad))

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
        known = self.sum_calls[module].get((name, place(frame)), []) if module in self.sum_calls else []
        if any(known):
            if not all(known) or len(outs) != 1:
                self._fail(f"`{module}`: {name} sums here and not there", module)
                return
            if self._sum(outs[0], module, along=name not in CONVOLUTIONS):
                params = [p[0] for t in given if (p := self.tracer.shadow(t).param) is not None and p[0] not in self.split]
                self.call_sums[module, name, place(frame)] = params[0] if params else None
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
            self.otherwise.reads |= {read for n in sizes if isinstance(n, LocalInt) for read in n.reads}

    def joined(self, module: str) -> None:
        """After a call: whether tokens met."""
        if self.problem is None and self.nodes is not None:
            parent = self.tracer.trace.classes.find(self.nodes)
            if not torch.equal(parent, self.nodes):
                self._fail("tokens meet outside attention", module)

    # ----------------------------------------------------------------------------------------------------- result

    def check(self, trace: Trace) -> None:
        """Whether all of it can be as Megatron-LM has it.

        Raises:
            CantBeInShards: if not.
        """
        unsummed = {r.name for r in self.regions.values() if r.summed is False}
        if self.problem:
            raise CantBeInShards(str(self.problem), self.problem.modules | unsummed, self.otherwise)
        if self.nodes is None or not self.left:
            raise CantBeInShards("its blocks did not run")
        if unsummed:
            raise CantBeInShards("a region does not return a sum", unsummed)
        self.joined("")
        if self.problem:
            raise self.problem
        if self.recorder.bad:
            why = "its code has sizes of the sequence in it, or what is whole meets tokens"
            raise CantBeInShards(why, self._around(self.recorder.bad), self.otherwise)
        if LocalInt.diverging - self.choices.reads:
            raise CantBeInShards(
                "its code decides by the length of the sequence", self._around({read[0] for read in LocalInt.diverging})
            )
        summed = len(self.sums) + len(self.call_sums) + sum(r.how == "return" and bool(r.summed) for r in self.regions.values())
        if len(self.blocks) < LEAST_BLOCKS or not summed:
            raise CantBeInShards(f"{summed} sums over ranks in {len(self.blocks)} blocks: at its ends it is gathered once more")
        if len(self.gathered) > summed:
            raise CantBeInShards(f"the stream would be gathered {len(self.gathered)} times for {summed} sums")

    def _around(self, modules: set[str]) -> set[str]:
        """These, and the regions of the blocks whose own code it is."""
        of = {r for m in modules if m in self.blocks for r in self.regions if r.startswith(f"{m}.")}
        return modules | ({r for r in of if self.regions[r].inner and not self.regions[r].summed} or of)

    def found(self, trace: Trace) -> _Cut:
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
                        raise CantBeInShards(f"`{module}` reads the length of the sequence along another dim than 1", {module})
                    reads.setdefault(module, []).append(replace(c, sizes=sizes))
        return _Cut(self.blocks, self.entry, self.regions, self.sums, self.deferred, self.call_sums, on_tokens, on_whole, reads)


def _along(nodes: Tensor, t: Tensor) -> Tensor:
    return nodes.view(1, -1, *[1] * (t.ndim - 2)).expand(t.shape)


# ------------------------------------------------------------------------------------------------------ features followed


class _Doors:
    """Puts labels at the doors of regions, while features are followed: inside, every rank has the stream, with a share of its gradient."""

    def __init__(self, model: nn.Module, rules: list[Rule], cuts: list[_Cut]) -> None:
        self.model, self.cuts = model, cuts
        self.columns = {r.pattern: r.style for r in rules if isinstance(r.style, Colwise)}
        self.handles: list[Any] = []
        self.reads: dict[str, set[str]] = {}
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

    def open(self, tracer: Tracer) -> None:
        """For one run."""
        self.close()
        self.reads.clear()
        tracer.gathered = True
        running: list[int] = []
        hidden: dict[str, list[tuple[Tensor, Shadow]]] = {}

        def whole(t: Tensor) -> None:
            tracer.put(t, Shadow(None, None, tracer.shadow(t).grad))

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
                    tracer.put(t, Shadow(torch.zeros((), dtype=torch.int64).expand(t.shape), None, tracer.shadow(t).grad))
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
                self.reads.setdefault(name, set()).add(
                    "replicate" if label is None else "width" if bool(shrunk(label).any()) else "gathered"
                )

            return hook

        for i, cut in enumerate(self.cuts):
            self._hook(cut.blocks[0], begin(i), None)
            self._hook(cut.blocks[-1], None, lambda *_: (running.pop() if running else None, None)[1])
            for region in cut.regions.values():
                self._hook(region.name, enter(region), leave(region))
        for name, style in self.columns.items():
            gathered = _unseen(lambda m, a, out: whole(out)) if style.output == "replicate" else None
            self._hook(name, read(name), gathered)

    def _hook(self, name: str, enter: Any, leave: Any) -> None:
        module = self.model.get_submodule(name)
        if enter is not None:
            self.handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        if leave is not None:
            self.handles.append(module.register_forward_hook(leave))


def _with_cuts(model: nn.Module, rules: list[Rule], cuts: list[_Cut], replan: Replan, alike: Alike) -> Plan:
    """The plan with these streams in shards.

    Raises:
        CantBeInShards: if the code in the regions can't work on a stream that it has a share of the gradient of.
    """
    regions = {n: r for cut in cuts for n, r in cut.regions.items()}
    with _Doors(model, rules, cuts).closed_after() as doors:
        plan, found = replan(doors.open)
        reads = dict(doors.reads)
        if doors.problem:
            raise CantBeInShards(doors.problem)
    assert found.trace is not None
    if found.trace.escaped:
        raise CantBeInShards("a share of a gradient meets what is whole", set(found.trace.escaped))
    sums, terms = {n for cut in cuts for n in cut.sums}, {n for cut in cuts for n in cut.terms}
    call_sums = {key: bias for cut in cuts for key, bias in cut.call_sums.items()}
    reads_of = {m: _alike(calls) for cut in cuts for m, calls in cut.reads.items()}
    direct = {n for n, r in regions.items() if n in reads and reads[n] == {"gathered"} and len(r.args or ()) == 1}
    new: list[Rule] = []
    for rule in _expanded(plan, model):
        if followed(rule.pattern, alike) != rule.pattern:
            continue
        style, name = rule.style, rule.pattern
        if isinstance(style, Colwise) and (how := reads.get(name, {"replicate"})) != {"replicate"}:
            if how != {"gathered"}:
                raise CantBeInShards(f"`{name}` reads the stream and what is whole", {name})
            style = replace(style, input="sequence" if name in direct else "gathered")
        elif isinstance(style, Rowwise) and name in sums | terms:
            style = replace(style, output="sequence" if name in sums else "partial")
        elif isinstance(style, LocalOps):
            inside = any(name == r or name.startswith(f"{r}.") for r, of in regions.items() if of.how == "return" and of.summed)
            to: State = "partial" if inside else "replicate"
            style = replace(
                style,
                calls=tuple(
                    replace(c, to="sequence" if (name, c.name, c.at) in call_sums else to) if c.leave else c for c in style.calls
                ),
            )
            if name in reads_of:
                both = {(c.name, c.at) for c in style.calls} & {(c.name, c.at) for c in reads_of[name]}
                if both:
                    raise CantBeInShards(f"`{name}` reads sizes of tokens and of features by one call", {name})
                style = replace(style, calls=(*style.calls, *reads_of.pop(name)))
        new.append(Rule(name, style, rule.reason))
    new += [Rule(name, LocalOps(tuple(calls)), "the length of the sequence in its code") for name, calls in reads_of.items()]
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


def _moves(cut: _Cut, direct: set[str]) -> Iterator[Rule]:
    """What crosses the ranks at the doors of blocks and regions."""
    yield Rule(
        cut.blocks[0],
        PrepareInput(arrives="replicate", wanted="sequence", arg=cut.entry),
        "the stream is cut into tokens here",
    )
    for region in cut.regions.values():
        for arg in (region.args or ()) if region.name not in direct else ():
            yield Rule(region.name, PrepareInput(arrives="sequence", wanted="gathered", arg=arg), "gathered once for all in it")
        if region.how == "return" and region.summed:
            yield Rule(region.name, PrepareOutput(arrives="partial", wanted="sequence"), "the ranks' terms are summed once")
    yield Rule(cut.blocks[-1], PrepareOutput(arrives="sequence", wanted="replicate"), "and gathered here")


def _on_tokens(model: nn.Module, rules: list[Rule], cuts: list[_Cut], found: Found) -> Iterator[Rule]:
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
            raise CantBeInShards(f"`{n}` works on the stream and on what is whole", here)
    for cut in cuts:
        for block in cut.blocks:
            inside = [n for n, _ in model.get_submodule(block).named_parameters(prefix=block)]
            mine = [n for n in inside if n in on_tokens and not any(n == r or n.startswith(f"{r}.") for r in ruled)]
            for owner in dict.fromkeys(n.rpartition(".")[0] for n in mine):
                all_of_it = {n for n in inside if n.startswith(f"{owner}.")}
                together = owner != block and all_of_it <= set(mine)
                for n in [owner] if together else [n for n in mine if n.rpartition(".")[0] == owner]:
                    yield Rule(n, Sequence(), "works on this rank's tokens")


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
