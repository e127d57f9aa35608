"""Blocks that do the same as an earlier one: a deep model is followed through one of each kind.

What a block does is written down as its operations, with where each operand comes from; blocks of one class whose lists are equal are
alike. In the runs that follow labels, a block like one that has run already is given outputs of the same shapes at once. Rules for the
one are then rules for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_tp.fsdp import find_blocks
from lightning_tp.infer.classes import shrunk
from lightning_tp.infer.trace import Shadow, Tracer, Values, _untraced, run
from lightning_tp.plan import Rule
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
    logs: list[_Log] = []

    def log(model: nn.Module, whole: Any, shared: Any) -> _Log:
        logs.append(_Log(model, blocks))
        return logs[-1]

    try:
        run(model, call, inputs, set(), {}, tracer_of=log)
    except Exception:  # the runs that follow labels say what is wrong
        return {}
    finally:
        for handle in logs[0].handles:
            handle.remove()
    first: dict[Any, str] = {}
    kinds: dict[Any, str] = {}
    alike = {}
    for name, block in blocks.items():
        done = logs[0].lists.get(name)
        if done is not None:
            like = first.setdefault(tuple(done), name)
            kinds.setdefault(_kind(name, block), like)
            if like != name:
                alike[name] = like
    for name, block in blocks.items():
        if name not in logs[0].lists and _kind(name, block) in kinds:  # not run this time, as by chance (layer drop)
            alike[name] = kinds[_kind(name, block)]
    return alike


def _kind(name: str, block: nn.Module) -> Any:
    return name.rpartition(".")[0], type(block), tuple((n, tuple(p.shape)) for n, p in block.named_parameters())


@contextmanager
def blocks_once(model: nn.Module, tracer: Tracer | None, alike: Alike, ran: set[str]) -> Iterator[None]:
    """While this runs, a block like one that has run with inputs like its own is given outputs like its.

    Without a tracer, tensors are compared by their shapes only.
    The names of blocks that run go into `ran`.
    """
    seen: dict[str, list[tuple[Any, Any]]] = {}
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
    tracer: Tracer | None,
    seen: dict[str, list[tuple[Any, Any]]],
    ran: set[str],
) -> Callable[..., Any]:
    shadow = tracer.shadow if tracer is not None else lambda t: Shadow()

    def quick(*args: Any, **kwargs: Any) -> Any:
        given, spec = tree_flatten((args, kwargs))
        with torch._C.DisableTorchFunction(), _untraced():
            for first, made in seen.get(like, ()):
                out = _again(first, made, given, spec, tracer)
                if out is not None:
                    return out[0]
        before = [(t, shadow(t)) if isinstance(t, Tensor) else (t, None) for t in given]
        ran.add(name)
        out = forward(*args, **kwargs)
        outs, out_spec = tree_flatten(out)
        seen.setdefault(like, []).append(((before, spec), [*((t, shadow(t)) for t in outs), out_spec]))
        return out

    return quick


def _again(first: Any, made: Any, given: list[Any], spec: Any, tracer: Tracer | None) -> tuple[Any] | None:
    """Outputs like those that were `made` of the `first` inputs; None if these are others."""
    before, spec_before = first
    *outs, out_spec = made
    if spec != spec_before or len(before) != len(given):
        return None
    for (x, shadow), y in zip(before, given, strict=True):
        if isinstance(x, Tensor) != isinstance(y, Tensor):
            return None
        if isinstance(y, Tensor):
            mine = tracer.shadow(y) if tracer is not None else Shadow()
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
            if source is None:
                return None  # features that the block has made leave it: those of this one are others
            label = tracer.shadow(given[source]).label
        tracer.put(copy, Shadow(label, None, shadow.grad))
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
