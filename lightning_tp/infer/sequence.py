"""Where the residual stream of repeated blocks may lie in shards of the sequence: sequence parallelism, inferred.

From the first block to the last, what is neither inside an attention nor inside an MLP (norms, dropout, residual sums) is to run on this
rank's tokens. The blocks are run once more with a label on each token: that has to come out of every operation between the split regions
unmixed, without a size or an operand that would have to change. A region (the smallest module that takes the stream whole and gives its
sum back) is entered by an all-gather and left by a reduce-scatter, as in Megatron-LM; where the code does not allow just that, the stream
stays whole, since anything else would cost more than it saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tp.comm import even_shard
from lightning_tp.fsdp import find_blocks
from lightning_tp.infer.record import LocalInt, Recorder
from lightning_tp.infer.repeats import Alike, blocks_once, followed, for_all
from lightning_tp.infer.trace import Shadow, Tracer, _untraced, leaves, run
from lightning_tp.plan import Plan, Rule
from lightning_tp.styles import Colwise, PrepareInput, PrepareOutput, Replicate, Rowwise, Sequence

Arg = int | str


class _No(Exception):
    """The stream stays whole, and why."""


@dataclass
class _Region:
    """A module that is entered with the whole stream: what arrives by which argument, who reads it, what sums at its end."""

    name: str
    arg: Arg | None = None
    readers: set[str] = field(default_factory=set)
    sums: str | None = None  # the row-wise layer whose result it returns
    enters: bool = False
    leaves: bool = False


def with_sequence_parallel(
    model: nn.Module, call: Callable[[nn.Module, Any], Any], inputs: Any, plan: Plan, tp: int, alike: Alike | None = None
) -> Plan:
    """The plan, with the streams of repeated blocks in shards of the sequence where the code allows it.

    Blocks that are like an earlier one (see `repeats.py`) are not followed: they are ruled as that one is.
    """
    alike = alike or {}
    rules = _expanded(plan, model)
    for blocks in _streams(model):
        for deep in (False, True):
            try:
                rules = _cut(model, call, inputs, rules, blocks, tp, deep, alike)
                break
            except _No:
                continue
    return Plan([*rules, *(r for r in plan.rules if r.pattern == "**")], plan.source)


def _expanded(plan: Plan, model: nn.Module) -> list[Rule]:
    everything = [n for n, _ in model.named_modules(remove_duplicate=False)]
    everything += [n for n, _ in model.named_parameters(remove_duplicate=False)]
    return [Rule(n, r.style, r.reason) for r in plan.rules if r.pattern != "**" for n in everything if r.matches(n)]


def _streams(model: nn.Module) -> Iterator[list[str]]:
    """The names of blocks that follow each other, by what holds them."""
    by_holder: dict[str, list[str]] = {}
    for name, _ in find_blocks(model):
        by_holder.setdefault(name.rpartition(".")[0], []).append(name)
    yield from by_holder.values()


def _cut(
    model: nn.Module,
    call: Callable[[nn.Module, Any], Any],
    inputs: Any,
    rules: list[Rule],
    blocks: list[str],
    tp: int,
    deep: bool,
    alike: Alike,
) -> list[Rule]:
    alike = {name: like for name, like in alike.items() if name in blocks}
    rules = [r for r in rules if followed(r.pattern, alike) == r.pattern]
    regions = {r.name: r for b in blocks if b not in alike for r in _regions(model, rules, b, deep)}
    names = {n for n, _ in model.named_parameters()}
    everything = {(n, d) for n in names for d in range(8)}
    made: list[_Stream] = []

    def recorder(tracer: Tracer) -> Recorder:
        made.append(_Stream(model, tracer, regions, blocks, rules, tp))
        return made[-1].recorder

    try:
        trace, out, tracer = run(
            model, call, inputs, everything, {}, recorder, during=lambda tracer: blocks_once(model, tracer, alike)
        )
    finally:
        for stream in made:
            stream.close()
    stream = made[0]
    stream.check(trace)
    if any(label is not None and bool(label.any()) for label in (tracer.shadow(t).label for t in leaves(out))):
        raise _No("tokens in shards leave the model")
    split = [r.pattern for r in rules if r.style.splits_parameters and not isinstance(r.style, Replicate)]
    if any(n == s or n.startswith(f"{s}.") for n in trace.local_uses for s in split):
        raise _No("a layer that is split reads tokens in shards")
    if not all(any(n.startswith(f"{b}.") for b in blocks) for n in trace.local_uses):
        raise _No("something between the blocks works on tokens in shards")
    return for_all(_with_regions(rules, regions, blocks, stream.entry, trace, model), alike)


def _regions(model: nn.Module, rules: list[Rule], block: str, deep: bool) -> Iterator[_Region]:
    """The topmost modules below a block that hold split layers; `deep`: below those that hold anything else, too."""
    inside = {r.pattern: r.style for r in rules if r.pattern.startswith(f"{block}.")}
    if any(r.pattern == block for r in rules):
        raise _No("the block's own code is changed")
    split = {n for n, s in inside.items() if not isinstance(s, Replicate)}
    if not split:
        raise _No("nothing is split in it")

    def walk(name: str) -> Iterator[_Region]:
        module = model.get_submodule(name)
        for child, m in module.named_children():
            where = f"{name}.{child}"
            here = {n for n in split if n == where or n.startswith(f"{where}.")}
            if not here:
                continue
            others = {n for n, _ in m.named_parameters(prefix=where) if not any(n == h or n.startswith(f"{h}.") for h in here)}
            if isinstance(m, (nn.ModuleList, nn.ModuleDict)) or (deep and others and where not in split):
                yield from walk(where)
            else:
                yield _Region(where)

    yield from walk(block)


def _unseen(hook: Callable[..., None]) -> Callable[..., None]:
    """What a hook reads is not what the code reads."""

    @wraps(hook)
    def quiet(*args: Any) -> None:
        with torch._C.DisableTorchFunction(), _untraced():
            hook(*args)

    return quiet


class _Stream:
    """Follows the tokens of one stream through a run: hooks at the doors of its blocks and regions."""

    def __init__(
        self, model: nn.Module, tracer: Tracer, regions: dict[str, _Region], blocks: list[str], rules: list[Rule], tp: int
    ) -> None:
        self.tracer, self.regions, self.blocks, self.tp = tracer, regions, blocks, tp
        self.styles = {r.pattern: r.style for r in rules}
        self.nodes: Tensor | None = None
        self.shape: tuple[int, ...] = ()
        self.entry: Arg | None = None
        self.sums: dict[int, tuple[Tensor, str]] = {}
        self.hidden: dict[str, list[tuple[Tensor, Shadow]]] = {}
        self.problem: str | None = None
        self.owner = torch.full((1,), -1)
        self.recorder = Recorder(tracer, self.owner, tp, set(), {}, {}, set())
        self.left = False
        self.handles = []
        for name in blocks:
            module = model.get_submodule(name)
            self.handles.append(module.register_forward_pre_hook(self._enter_block(name), with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._leave_block(name)))
        for name in regions:
            module = model.get_submodule(name)
            self.handles.append(module.register_forward_pre_hook(self._enter_region(name), with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._leave_region(name)))
        for name, module in model.named_modules():
            if isinstance(module, nn.Dropout) and any(name.startswith(f"{b}.") for b in blocks):
                self.handles.append(module.register_forward_hook(self._drop))
        for name, style in self.styles.items():
            if isinstance(style, Rowwise) and any(name.startswith(f"{b}.") for b in blocks):
                module = model.get_submodule(name)
                self.handles.append(module.register_forward_hook(lambda m, a, out, n=name: self.sums.update({id(out): (out, n)})))

    @_unseen
    def _drop(self, module: nn.Module, args: Any, out: Tensor) -> None:
        """A dropout behind a sum drops from this rank's tokens."""
        if id(args[0]) in self.sums:
            self.sums[id(out)] = (out, self.sums[id(args[0])][1])

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()

    def _label(self, t: Tensor) -> None:
        assert self.nodes is not None
        label = self.nodes.view(1, -1, *[1] * (t.ndim - 2)).expand(t.shape)
        self.tracer.put(t, Shadow(label, None, self.tracer.shadow(t).grad))

    def _fail(self, why: str) -> None:
        self.problem = self.problem or why

    def _enter_block(self, name: str) -> Any:
        @_unseen
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            named = _named(args, kwargs)
            if name == self.blocks[0] and self.nodes is None:
                found = next(((k, t) for k, t in named if t.is_floating_point() and t.ndim == 3), None)
                if found is None:
                    self._fail("its first block is given no (batch, sequence, width)")
                    return
                self.entry, x = found
                self.shape = tuple(x.shape)
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
            if first is None or tuple(first.shape) != self.shape or self.tracer.shadow(first).label is None:
                self._fail("a block does not return the stream")
                return
            others = [t for t in _all(out) if t is not first and self.tracer.shadow(t).label is not None]
            if others:
                self._fail("a block returns more than the stream")
            if name == self.blocks[-1]:
                self.left = True
                self.tracer.put(first, Shadow(None, None, self.tracer.shadow(first).grad))

        return hook

    def _enter_region(self, name: str) -> Any:
        @_unseen
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            region = self.regions[name]
            arriving = [(k, t) for k, t in _named(args, kwargs) if self.tracer.shadow(t).label is not None]
            if len(arriving) > 1:
                self._fail(f"`{name}` takes the stream by several arguments")
            self.hidden[name] = [(t, self.tracer.shadow(t)) for _, t in arriving]
            for key, t in arriving:
                region.arg, region.enters = key, True
                self.tracer.put(t, Shadow(None, None, self.tracer.shadow(t).grad))
                self.tracer.watched[id(t)] = region.readers

        return hook

    def _leave_region(self, name: str) -> Any:
        @_unseen
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            region = self.regions[name]
            for t, shadow in self.hidden.pop(name, []):
                self.tracer.watched.pop(id(t), None)
                self.tracer.put(t, shadow)
            first = _first(out)
            if first is not None and id(first) in self.sums and tuple(first.shape) == self.shape:
                region.sums, region.leaves = self.sums[id(first)][1], True
                self._label(first)

        return hook

    def check(self, trace: Any) -> None:
        """Whether all of it can be as Megatron-LM has it.

        Raises:
            _No: if not.
        """
        found = self.recorder.found
        if self.problem:
            raise _No(self.problem)
        if self.nodes is None or not self.left:
            raise _No("its blocks did not run")
        if trace.classes.find(self.nodes).unique().numel() != self.nodes.numel():
            raise _No("tokens meet outside attention")
        if found.broken or any(c.operands or c.sizes or c.pieces or c.items for calls in found.calls.values() for c in calls):
            raise _No("its code has sizes of the sequence in it")
        if LocalInt.diverging:
            raise _No("its code decides by the length of the sequence")
        for region in self.regions.values():
            columns = {n for n, s in self.styles.items() if isinstance(s, Colwise) and s.input == "replicate"}
            if region.enters and not region.readers <= columns:
                raise _No(f"`{region.name}`: the stream is read by more than column-wise layers")
            if region.enters and not region.leaves and self.styles.get(region.name) is None:
                raise _No(f"`{region.name}` does not return a sum")


def _with_regions(
    rules: list[Rule], regions: dict[str, _Region], blocks: list[str], entry: Arg | None, trace: Any, model: nn.Module
) -> list[Rule]:
    readers = {n for r in regions.values() if r.enters for n in r.readers}
    sums = {r.sums for r in regions.values() if r.leaves}
    direct = {r.name for r in regions.values()} & readers
    new: list[Rule] = []
    for rule in rules:
        style = rule.style
        if rule.pattern in readers and isinstance(style, Colwise):
            style = replace(style, input="sequence" if rule.pattern in direct else "gathered")
        if rule.pattern in sums and isinstance(style, Rowwise):
            style = replace(style, output="sequence")
        new.append(Rule(rule.pattern, style, rule.reason))
    new.append(
        Rule(blocks[0], PrepareInput(arrives="replicate", wanted="sequence", arg=entry), "the stream is cut into tokens here")
    )
    for region in regions.values():
        if region.enters and region.name not in direct:
            why = f"gathered once for {', '.join(sorted(n.rpartition('.')[2] for n in region.readers))}"
            new.append(Rule(region.name, PrepareInput(arrives="sequence", wanted="gathered", arg=region.arg), why))
    new.append(Rule(blocks[-1], PrepareOutput(arrives="sequence", wanted="replicate"), "and gathered here"))
    ruled = {r.pattern for r in rules if r.style.splits_parameters}
    for block in blocks:
        inside = [n for n, _ in model.get_submodule(block).named_parameters(prefix=block)]
        on_tokens = [n for n in inside if n in trace.local_uses and not any(n == r or n.startswith(f"{r}.") for r in ruled)]
        if mixed := [n for n in on_tokens if n in trace.whole_uses]:
            raise _No(f"`{mixed[0]}` works on the stream and on what is whole")
        owners = dict.fromkeys(n.rpartition(".")[0] for n in on_tokens)
        for owner in owners:
            all_of_it = {n for n in inside if n.startswith(f"{owner}.")}
            names = (
                [owner]
                if owner != block and all_of_it <= set(on_tokens)
                else [n for n in on_tokens if n.rpartition(".")[0] == owner]
            )
            new += [Rule(n, Sequence(), "works on this rank's tokens") for n in names]
    return new


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
