"""Blocks that do the same as an earlier one: a deep model is followed through one of each kind.

What a block does is written down as its operations, with where each operand comes from; blocks of one class whose lists are equal are
alike. In the runs that follow labels, a block like one that has run already is given outputs of the same shapes at once. Rules for the
one are then rules for all.

Nor does the run that writes down operations go through all of them: of blocks with the same code, settings, shapes and inputs three are run,
the first two and the last. Such blocks differ only in their own number, where they keep it. Code that decides or computes by that is noticed
(see `_Place`), as is a difference between the three; then all blocks run.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_tp._compat import unobserved
from lightning_tp.core.modules.blocks import find_blocks, own_numbers
from lightning_tp.infer.follow.features import shrunk
from lightning_tp.infer.follow.meta import Values
from lightning_tp.infer.follow.run import run
from lightning_tp.infer.follow.trace import TensorFacts
from lightning_tp.infer.follow.tracer import FeatureTracer
from lightning_tp.plan.rule import Rule
from lightning_tp.styles import PrepareInput, PrepareOutput

FEWEST = 4  # blocks of one kind, from which it is worth to look


Alike = dict[str, str]  # a block's name -> that of the first that does the same


class _Log(Values):
    """Writes down the operations inside blocks, and follows nothing."""

    def __init__(self, model: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
        super().__init__(model)
        self.blocks = blocks
        self.lists: dict[str, list[Any]] = {}
        self.inside: str | None = None
        self.origin: dict[int, tuple[Tensor, Any]] = {}  # of tensors of the block that runs
        self.outside = {id(t): (t, ("outside", n)) for n, t in [*model.named_parameters(), *model.named_buffers()]}
        self.handles = []
        for name, block in blocks.items():
            self.handles.append(block.register_forward_pre_hook(lambda m, a, n=name: self._enter(n)))
            self.handles.append(block.register_forward_hook(lambda m, a, o: self._leave()))

    def mark(self, name: str) -> int:
        """How much is written down of a block by now."""
        return len(self.lists[name])

    def since(self, name: str, mark: int) -> list[Any]:
        """What was written down since then."""
        return self.lists[name][mark:]

    def stands_in(self, name: str, done: list[Any]) -> None:
        """A block does not run: it would do this."""
        self.lists[name] += done

    def _enter(self, name: str) -> None:
        self.inside = name
        block = self.blocks[name]
        tensors = [*block.named_parameters(), *block.named_buffers()]
        self.origin = dict(self.outside) | {id(t): (t, ("own", n)) for n, t in tensors}
        self.lists.setdefault(name, []).append(
            (type(block), tuple((n, tuple(t.shape), t.dtype, t.requires_grad) for n, t in tensors), tuple(_classes(block)))
        )

    def _leave(self) -> None:
        self.inside, self.origin = None, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.inside is not None:
            ops = self.lists[self.inside]
            where = self.stack[-1].removeprefix(self.inside)
            ops.append((func, where, *(self._operand(x) for x in tree_flatten((args, kwargs))[0])))
            for i, t in enumerate(tree_flatten(out)[0]):
                if isinstance(t, Tensor):
                    self.origin[id(t)] = (t, ("made", len(ops), i))
        return out

    def _operand(self, x: Any) -> Any:
        if isinstance(x, float):
            return float  # a scale: no matter for what is where
        if not isinstance(x, Tensor):
            return x if isinstance(x, (int, str, type(None))) else str(x)
        if id(x) not in self.origin:
            self.origin[id(x)] = (x, ("given", len(self.origin), tuple(x.shape), x.dtype))
        return self.origin[id(x)][1]


def _classes(module: nn.Module) -> Iterator[Any]:
    for name, m in module.named_modules():
        yield name, type(m), m.training


def alike_blocks(model: nn.Module, call: Callable[[nn.Module, Any], Any], inputs: Any) -> Alike:
    """Run the model once and see which of its repeated blocks do the same.

    Returns:
        block -> the first one like it; empty if there are few blocks, or the model could not be run.
    """
    blocks = dict(find_blocks(model))
    if len(blocks) < FEWEST:
        return {}
    same, places = _same_code(blocks)
    used: list[str] = []
    of: dict[str, list[str]] = {}
    for name, like in same.items():
        of.setdefault(like, []).append(name)
    probes = {name: like for like, names in of.items() for name in (names[0], names[-1])}
    with _watched(places, used):
        once = {name: like for name, like in same.items() if name not in probes}
        lists = _written_down(model, call, inputs, blocks, once) if once else None
    if lists is None or used or any(lists.get(name) != lists.get(like) for name, like in probes.items()):
        lists = _written_down(model, call, inputs, blocks, {})  # code looks at a block's number, or for what each of them leaves
    if lists is None:  # the runs that follow labels say what is wrong
        return {}
    first: dict[Any, str] = {}
    kinds: dict[Any, str] = {}
    alike = {}
    for name, block in blocks.items():
        done = lists.get(name)
        if done is not None:
            like = first.setdefault(tuple(done), name)
            kinds.setdefault(_kind(name, block), like)
            if like != name:
                alike[name] = like
    for name, block in blocks.items():
        if name not in lists and _kind(name, block) in kinds:  # not run this time, as by chance (layer drop)
            alike[name] = kinds[_kind(name, block)]
    return alike


def _written_down(
    model: nn.Module, call: Callable[[nn.Module, Any], Any], inputs: Any, blocks: Mapping[str, nn.Module], same: Alike
) -> dict[str, list[Any]] | None:
    """Each block's operations; those of a block that does the `same` with inputs like an earlier one's are that one's. None: it can't be run."""
    logs: list[_Log] = []

    def log(model: nn.Module, whole: Any, shared: Any) -> _Log:
        logs.append(_Log(model, blocks))
        return logs[-1]

    try:
        run(model, call, inputs, set(), {}, tracer_of=log, during=lambda tracer: blocks_once(model, tracer, same, set()))
    except Exception:
        return None
    finally:
        for handle in logs[0].handles:
            handle.remove()
    return logs[0].lists


def _kind(name: str, block: nn.Module) -> Any:
    return name.rpartition(".")[0], type(block), tuple((n, tuple(p.shape)) for n, p in block.named_parameters())


@contextmanager
def blocks_once(model: nn.Module, tracer: FeatureTracer | None, alike: Alike, ran: set[str]) -> Iterator[None]:
    """While this runs, a block like one that has run with inputs like its own is given outputs like its.
    A log takes what that one did for what this one would do.

    Without a tracer, tensors are compared by their shapes only.
    The names of blocks that run go into `ran`.
    """
    seen: dict[str, list[tuple[Any, Any, list[Any]]]] = {}
    kept: list[tuple[nn.Module, Any]] = []
    for name in {*alike, *alike.values()}:
        module = model.get_submodule(name)
        kept.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = _once(module.forward, name, alike.get(name, name), tracer, seen, ran)
    try:
        yield
    finally:
        for module, forward in kept:
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


def _once(
    forward: Callable[..., Any],
    name: str,
    like: str,
    tracer: FeatureTracer | None,
    seen: dict[str, list[tuple[Any, Any, list[Any]]]],
    ran: set[str],
) -> Callable[..., Any]:
    shadow = tracer.shadow if tracer is not None else lambda t: TensorFacts()
    log = tracer if isinstance(tracer, _Log) else None

    def quick(*args: Any, **kwargs: Any) -> Any:
        given, spec = tree_flatten((args, kwargs))
        with unobserved():
            for first, made, done in seen.get(like, ()):
                out = _again(first, made, given, spec, tracer)
                if out is not None:
                    if log is not None:
                        log.stands_in(name, done)
                    return out[0]
        before = [(t, shadow(t)) if isinstance(t, Tensor) else (t, None) for t in given]
        ran.add(name)
        mark = log.mark(name) if log is not None else 0
        out = forward(*args, **kwargs)
        outs, out_spec = tree_flatten(out)
        done = log.since(name, mark) if log is not None else []
        seen.setdefault(like, []).append(((before, spec), [*((t, shadow(t)) for t in outs), out_spec], done))
        return out

    return quick


def _again(first: Any, made: Any, given: list[Any], spec: Any, tracer: FeatureTracer | None) -> tuple[Any] | None:
    """Outputs like those that were `made` of the `first` inputs; None if these are others."""
    before, spec_before = first
    *outs, out_spec = made
    if spec != spec_before or len(before) != len(given):
        return None
    for (x, shadow), y in zip(before, given, strict=True):
        if isinstance(x, Tensor) != isinstance(y, Tensor):
            return None
        if isinstance(y, Tensor):
            mine = tracer.shadow(y) if tracer is not None else TensorFacts()
            if x.shape != y.shape or x.dtype != y.dtype or shadow.grad != mine.grad or not _equal(shadow.label, mine.label):
                return None
            if (shadow.param or mine.param) is not None and shadow.param is not mine.param:
                return None
        elif isinstance(x, (int, str, type(None))) and x != y:
            return None
    new = []
    for t, shadow in outs:
        at = next((i for i, (x, _) in enumerate(before) if x is t), None)
        if not isinstance(t, Tensor) or at is not None:
            new.append(t if at is None else given[at])
            continue
        copy = t.detach().clone()
        new.append(copy)
        if tracer is None:
            continue
        label = shadow.label
        if label is not None:
            source = next((i for i, (_, s) in enumerate(before) if s is not None and _equal(s.label, label)), None)
            if source is not None:
                label = tracer.shadow(given[source]).label
            # else features that the block has made leave it, such as probabilities of its heads: those of the one that was followed stand
            # for this one's, whose weights will be cut like its
        tracer.put(copy, TensorFacts(label, None, shadow.grad))
        if id(t) in tracer.values:
            tracer.values[id(copy)] = (copy, tracer.values[id(t)][1])
    return (tree_unflatten(new, out_spec),)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(shrunk(a).squeeze(), shrunk(b).squeeze())


def followed(name: str, alike: Alike) -> str:
    """The same module or parameter in the block that was followed for this one."""
    for block, like in alike.items():
        if name == block or name.startswith(f"{block}."):
            return like + name[len(block) :]
    return name


def for_all(rules: list[Rule], alike: Alike) -> list[Rule]:
    """The rules for blocks that were followed, also for those like them; but the first and last one of a stream keep its doors."""
    new = list(rules)
    for name, like in alike.items():
        new += [
            Rule(name + r.pattern[len(like) :], r.style, r.reason)
            for r in rules
            if r.pattern.startswith(f"{like}.") or (r.pattern == like and not isinstance(r.style, (PrepareInput, PrepareOutput)))
        ]
    return new


Places = list[tuple[nn.Module, str]]  # attributes in which blocks keep their number


NOT_SETTINGS = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})


def _same_code(blocks: Mapping[str, nn.Module]) -> tuple[Alike, Places]:
    """Blocks that have the same classes, shapes and settings as an earlier one in their container, but for their own number; and where that is."""
    numbers = own_numbers(blocks)
    first: dict[Any, str] = {}
    same: Alike = {}
    places: Places = []
    for name, block in blocks.items():
        holder = name.rpartition(".")[0]
        mine = numbers[holder]
        modules = tuple(
            (
                n,
                type(m),
                tuple((k, "its number" if (n, k) in mine else _setting(v)) for k, v in m.__dict__.items() if k not in NOT_SETTINGS),
            )
            for n, m in block.named_modules()
        )
        tensors = tuple((n, _setting(t)) for n, t in [*block.named_parameters(), *block.named_buffers()])
        like = first.setdefault((holder, modules, tensors), name)
        if like != name:
            same[name] = like
        places += [(block.get_submodule(n), k) for n, k in mine]
    return same, places


def _setting(value: Any) -> Any:
    """What code can see of an attribute, to compare; what nothing is known about is equal to itself only."""
    if isinstance(value, float):
        return value != 0  # a scale: no matter for what is where
    if isinstance(value, (bool, int, str, bytes, type(None), torch.dtype, torch.device, FunctionType, type)):
        return type(value), value
    if isinstance(value, Tensor):
        return "tensor", tuple(value.shape), value.dtype, value.requires_grad
    if type(value) in (list, tuple, torch.Size):
        return type(value), tuple(_setting(v) for v in value)
    if type(value) in (dict, OrderedDict):
        return type(value), tuple((_setting(k), _setting(v)) for k, v in value.items())
    return "object", id(value)


class _Place(int):
    """A block's number, which notes that it is compared, computed with, hashed or shown. As the index of a list, it is not noticed: stores of
    what blocks have made take it so, such as a cache of keys and values."""

    used: list[str]


def _noticing(name: str) -> Any:
    plain = getattr(int, name)

    def method(self: _Place, *args: Any) -> Any:
        self.used.append(name)
        return plain(int.__int__(self), *args)

    return method


NOTICED = (
    "eq", "ne", "lt", "le", "gt", "ge", "hash", "bool", "int", "float", "str", "repr", "format", "index", "neg",
    "add", "radd", "sub", "rsub", "mul", "rmul", "mod", "rmod", "divmod", "pow", "floordiv", "rfloordiv", "truediv", "rtruediv",
    "and", "rand", "or", "xor", "lshift", "rshift",
)  # fmt: skip


for _name in (f"__{word}__" for word in NOTICED):
    setattr(_Place, _name, _noticing(_name))


@contextmanager
def _watched(places: Places, used: list[str]) -> Iterator[None]:
    """While this runs, the blocks' numbers note in `used` that code looks at them."""
    kept = [(module, name, module.__dict__[name]) for module, name in places]
    for module, name, value in kept:
        module.__dict__[name] = _Place(value)
        module.__dict__[name].used = used
    try:
        yield
    finally:
        for module, name, value in kept:
            module.__dict__[name] = value
