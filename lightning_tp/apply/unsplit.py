"""Run a split model as one process would: with its own code, and parameters that are all-gathered where they are used.

A plan is made from one way through a model. Where a call goes another way (in `eval()`, with other arguments, with hooks that were registered after
the split), its first run is compared with this one. If they differ, such calls run unsplit from then on: right, and as slow as on one rank.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, wraps
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from lightning_tp._compat import is_fsdp_hook
from lightning_tp.core.comm.mesh import DATA_PARALLEL
from lightning_tp.core.modules.snapshot import has_more_than, preserve_modules
from lightning_tp.core.modules.swap_class import swap_class
from lightning_tp.core.ops.random_calls import comparable_runs
from lightning_tp.core.ops.split_logits import SplitLogits
from lightning_tp.shards.parameter import in_forward
from lightning_tp.shards.view import depth, full_run, full_runs, full_view, local_view

RTOL = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the largest value of an output; others: 0.1
MOST_WITH_GRADIENTS = 500_000_000  # parameters of a model, in full, up to which gradients are compared
DEEPEST = 4  # containers inside of each other that are looked into
_BEFORE = "_tp_before_split"  # (class, settings) of a module
_NEW: Any = object()
_REGISTER = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook")
_NOT_USERS = {"lightning", "pytorch_lightning", "torch"}  # the summary of a model registers hooks that read shapes
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


class Ways:
    """The ways that calls of one module have gone, and whether each is right on shards.

    Args:
        model: that it is in.
        mesh: of the model.
        trusted: calls in this mode go the way that the plan was made from, the first of them; None: none do.
    """

    off = False  # in `always_on_shards`

    def __init__(self, model: Any, mesh: DeviceMesh, trusted: bool | None) -> None:
        self.model, self.mesh, self.trusted = ref(model), mesh, trusted
        self.known: dict[Any, set[Any] | None] = {}  # kind of a call -> kinds of its outputs; None: it is wrong on shards

    def __deepcopy__(self, memo: dict[int, Any]) -> Ways:
        twin = Ways(memo.get(id(self.model()), self.model()), self.mesh, self.trusted)
        twin.known = dict(self.known)
        return twin

    def call(self, module: nn.Module, run: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Call a module, by `run` on shards; unsplit where that is not right."""
        if Ways.off:
            return run(*args, **kwargs)
        kind = (module.training, torch.is_grad_enabled(), kind_of(args), kind_of(kwargs))
        model = self._model_of(module)
        known = self.known.get(kind, _NEW)
        if known is _NEW:
            if module.training == self.trusted:
                self.trusted = None
                known = self.known[kind] = set()
            else:
                known = self._check(kind, model, module, run, args, kwargs)
        if known is None:
            return run_unsplit(model, module, args, kwargs)
        out = run(*args, **kwargs)
        made = kind_of(out)
        if made not in known:
            if known and self._check(kind, model, module, run, args, kwargs, hooks=True) is None:  # it has gone another way
                return run_unsplit(model, module, args, kwargs)
            known.add(made)
        return out

    def _model_of(self, module: nn.Module) -> nn.Module:
        return self.model() or module

    def _check(self, kind: Any, model: nn.Module, module: nn.Module, run: Any, args: Any, kwargs: Any, hooks: bool = False) -> Any:
        comparison = Comparison(model, module, run, args, kwargs, hooks)
        why = comparison.difference(self.mesh)
        if why is not None:
            warn_unsplit(module, why)
        known = self.known[kind] = None if why is not None else {*(self.known.get(kind) or ()), *comparison.made}
        return known


@contextmanager
def always_on_shards() -> Iterator[None]:
    """Run split models on their shards whatever comes of it: to find out whether that is right."""
    before, Ways.off = Ways.off, True
    try:
        yield
    finally:
        Ways.off = before


def remember_unsplit(model: nn.Module) -> Callable[[], None]:
    """Remember the classes of all modules, and return a function to call after the split, which remembers the settings that it has changed."""
    before = [(m, type(m), dict(m.__dict__)) for m in model.modules()]

    def after() -> None:
        for module, cls, values in before:
            now = module.__dict__
            settings = {k: v for k, v in values.items() if isinstance(v, int) and type(now.get(k)) is int and now[k] != v}
            replaced = {k: v for k, v in values.items() if k == "forward" and k not in now}
            now[_BEFORE] = (cls, {**settings, **replaced})
            if settings:
                swap_class(module, _with_settings(tuple(settings)))

    return after


@cache
def _with_settings(names: tuple[str, ...]) -> type:
    """Return a mixin by which these sizes of a module are those of its shard in the forward, and full outside of it."""

    def size(name: str) -> property:
        def get(self: nn.Module) -> int:
            return self.__dict__[name] if depth() or in_forward() else self.__dict__[_BEFORE][1][name]

        return property(get, lambda self, value: self.__dict__.__setitem__(name, value))

    return type("_Sized", (nn.Module,), {name: size(name) for name in names})


@contextmanager
def unsplit(model: nn.Module) -> Iterator[None]:
    """Let the modules of a split model be what they were before the split for as long as this is entered."""
    undo: list[tuple[Any, ...]] = []
    try:
        for module in model.modules():
            own = module.__dict__
            if _BEFORE not in own:
                continue
            cls, settings = own[_BEFORE]
            gone = {k: own.pop(k) for k in ("_per_rank_calls",) if k in own}
            hooks = [(own[k], own[k].copy()) for k in _HOOKS if any(map(is_fsdp_hook, own[k].values()))]
            undo.append((module, type(module), {k: own.get(k) for k in settings}, gone, hooks))
            module.__class__ = cls
            own.update(settings)
            for table, before in hooks:
                for i in [i for i, hook in before.items() if is_fsdp_hook(hook)]:
                    del table[i]
        with full_run():
            yield
    finally:
        for module, cls, settings, gone, hooks in undo:
            module.__class__ = cls
            module.__dict__.update(gone)
            for table, before in hooks:
                new = [(i, hook) for i, hook in table.items() if i not in before]  # code may register some in its forward
                now = [(i, hook) for i, hook in before.items() if i in table or is_fsdp_hook(hook)]
                table.clear()
                table.update([*now, *new])
            for k, value in settings.items():
                if value is None:
                    del module.__dict__[k]
                else:
                    module.__dict__[k] = value


class Comparison:
    """A call that is run split and unsplit, without a trace.

    Args:
        model: that `module` is in.
        module: that is called.
        run: calls it split.
        args: of the call; as the next.
        kwargs: likewise.
        hooks: whether the user's hooks run, too: what they do beside their module is not undone.
    """

    def __init__(self, model: nn.Module, module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any, hooks: bool) -> None:
        self.model, self.module, self.run, self.hooks = model, module, run, hooks
        self.args, self.kwargs = args, kwargs
        self.made: set[Any] = set()  # kinds of the output

    def difference(self, mesh: DeviceMesh) -> str | None:
        """Say how outputs and gradients differ; None if they don't. A collective."""
        # FSDP2 only makes gradients in `backward`; without them a gathered weight is let go where it was used
        large = has_more_than(self.model, MOST_WITH_GRADIENTS)
        with_gradients = torch.is_grad_enabled() and mesh[DATA_PARALLEL].size() == 1 and not large
        full, gradients, error = self._outcome(lambda *a, **k: run_unsplit(self.model, self.module, a, k), with_gradients)
        if self._anywhere(error is not None, mesh):  # it can't be run alone
            return None
        split, split_gradients, error = self._outcome(self.run, with_gradients)
        if error is not None:
            why: str | None = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            why = _difference(full, split) or _gradient_difference(gradients, split_gradients)
        self.made.add(kind_of(full))
        return (why or "it differs on another rank") if self._anywhere(why is not None, mesh) else None

    def _anywhere(self, holds: bool, mesh: DeviceMesh) -> bool:
        """Return whether it holds on any rank of the mesh. A collective."""
        vote = torch.tensor(float(holds), device=mesh.device_type)
        for axis in mesh.mesh_dim_names or ():
            dist.all_reduce(vote, group=mesh.get_group(axis))
        return bool(vote)

    def _outcome(self, run: Callable[..., Any], with_gradients: bool) -> tuple[Any, dict[str, Tensor], Exception | None]:
        """Return the output of a run, this rank's shards of the gradients of a sum over it, and what the run raised."""
        device = _device(self.model)
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng([] if device is None or device.type != "cuda" else [device]))
            if not with_gradients:
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: None, lambda t: t))
            stack.enter_context(comparable_runs(self.model))
            stack.enter_context(preserve_modules(self.model))
            stack.enter_context(nullcontext() if self.hooks else _without_hooks(self.model))
            try:
                out = run(*_copied(self.args), **_copied(self.kwargs))
                return out, _gradients(self.model, out) if with_gradients else {}, None
            except Exception as error:
                return None, {}, error


def run_unsplit(model: nn.Module, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Call a module of a split model as one process would. All ranks all-gather its parameters."""
    with unsplit(model):
        return module(*args, **kwargs)


def _gradients(model: nn.Module, out: Any) -> dict[str, Tensor]:
    outputs = [t for t in _outputs(out) if t.requires_grad and t.numel()]
    terms = [(t * torch.arange(t.numel(), device=t.device).cos().view(t.shape)).sum() / t.numel() for t in outputs]
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not terms or not parameters:
        return {}
    found = torch.autograd.grad(sum(terms), list(parameters.values()), allow_unused=True)  # type: ignore[arg-type]
    with local_view():
        return {n: g.detach() for n, g in zip(parameters, found, strict=True) if g is not None}


def warn_unsplit(module: nn.Module, why: str) -> None:
    """Say once, on the first rank, that calls of a module run unsplit."""
    if dist.get_rank() == 0:
        warnings.warn(
            f"A call of {type(module).__name__} goes another way than the one that its plan was made from, and is wrong on shards ({why}). Such "
            "calls run unsplit: every rank all-gathers the parameters and computes all of it, which is right, and slow. To have it split, let "
            "the step that trains take this way in its first batch, or register hooks before the split (in `configure_model`).",
            stacklevel=4,
        )


@cache
def watch_hooks() -> None:
    """Let a model run unsplit as long as it has hooks that were registered after the split: what they are to see was not followed."""
    for name in _REGISTER:
        setattr(nn.Module, name, _watched(getattr(nn.Module, name)))


def _watched(register: Callable[..., RemovableHandle]) -> Callable[..., RemovableHandle]:
    @wraps(register)
    def watched(self: nn.Module, hook: Any, *args: Any, **kwargs: Any) -> RemovableHandle:
        late: LateHooks | None = self.__dict__.get("_tp_late_hooks")
        by = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        if late is None or depth() or full_runs() or by in _NOT_USERS:
            return register(self, hook, *args, **kwargs)
        if self.__dict__.get("_ways") is not None:  # what it is given and returns is full
            return register(self, full_view()(hook), *args, **kwargs)
        handle = register(self, hook, *args, **kwargs)
        late.add(self, handle)
        return handle

    return watched


class LateHooks:
    """The hooks of a model's modules that were registered after the split."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # what a model holds beside its layers (metrics) may be pickled

    def __init__(self, model: nn.Module) -> None:
        self.model = ref(model)
        self.registered = 0
        self.running: ExitStack | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copy is not watched

    def add(self, module: nn.Module, handle: RemovableHandle) -> None:
        """Count a hook until it is removed; from the first to the last, the model is unsplit."""
        model = self.model()
        if model is None:
            return
        if not self.registered:
            warn_unsplit(module, "it has hooks that were registered after the split")
            self.running = ExitStack()
            self.running.enter_context(unsplit(model))
        self.registered += 1
        remove = handle.remove

        def remove_once() -> None:
            remove()
            handle.remove = remove  # type: ignore[method-assign]
            self.registered -= 1
            if not self.registered and self.running is not None:
                self.running.close()

        handle.remove = remove_once  # type: ignore[method-assign]


def kind_of(x: Any, depth: int = DEEPEST) -> Any:
    """Return what of an argument or an output decides which way code goes: structure, switches, dims and dtypes; no sizes, no values of tensors."""
    if isinstance(x, Tensor):
        return x.ndim, x.dtype
    if x is None or isinstance(x, (bool, str)):
        return x
    if depth and isinstance(x, Mapping):
        return type(x), tuple([(k if isinstance(k, str) else type(k), kind_of(v, depth - 1)) for k, v in x.items()])
    if depth and isinstance(x, (list, tuple)):
        return type(x), tuple([kind_of(v, depth - 1) for v in x])
    return type(x)


def _device(model: nn.Module) -> torch.device | None:
    with local_view():
        return next((p.device for p in model.parameters()), None)


def _copied(tree: Any) -> Any:
    def copied(x: Any) -> Any:
        try:
            return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else copy.deepcopy(x)
        except Exception:
            return x

    return tree_map(copied, tree)


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    tables = [(m, k, m.__dict__[k]) for m in model.modules() for k in _HOOKS if m.__dict__[k]]
    for m, k, table in tables:
        m.__dict__[k] = type(table)((i, h) for i, h in table.items() if is_fsdp_hook(h))
    try:
        yield
    finally:
        for m, k, table in tables:
            m.__dict__[k] = table


def _outputs(x: Any, depth: int = DEEPEST) -> list[Tensor]:
    """Return the tensors of an output, but for those in a cache of keys and values, which goes back into the model."""
    if isinstance(x, Tensor):
        return [x]
    items = x.values() if isinstance(x, Mapping) else x if isinstance(x, (list, tuple)) else ()
    return [t for i in items for t in _outputs(i, depth - 1)] if depth else []


@torch.no_grad()
@local_view()
def _gradient_difference(full: Mapping[str, Tensor], split: Mapping[str, Tensor]) -> str | None:
    largest = max((float(g.abs().max()) for g in full.values() if g.numel()), default=0.0)
    for name in [*full, *(n for n in split if n not in full)]:
        a, b = (of[name].double() if name in of else torch.zeros(()) for of in (full, split))
        if not a.numel() or not b.numel():
            continue
        off = float((a - b).abs().max()) / max(float(a.abs().max()), 1e-3 * largest, 1e-12)
        if off > 10 * RTOL.get((full.get(name, split.get(name))).dtype, 0.1):  # type: ignore[union-attr]
            return f"the gradient of `{name}` differs by {off:.1e}"
    return None


@torch.no_grad()
def _difference(full: Any, split: Any) -> str | None:
    if kind_of(full) != kind_of(split):
        return "outputs of another structure"
    for a, b in zip(_outputs(full), _outputs(split), strict=True):
        if a.shape != b.shape:
            return f"an output of shape {tuple(b.shape)}, which is {tuple(a.shape)} in one process"
        if not a.numel():
            continue
        b = b.full_tensor() if isinstance(b, SplitLogits) else b  # said, so that no one is warned of it
        x, y = a.detach().double(), b.detach().double()
        off = (x - y).abs().max() / x.abs().max().clamp(min=1e-6)
        if not bool(off <= RTOL.get(a.dtype, 0.1 if a.is_floating_point() else 0.0)) and bool(x.isfinite().all()):
            return f"an output of shape {tuple(a.shape)} differs by {float(off):.1e}"
    return None
