"""The style of a module whose code hard-codes full sizes: single calls in it are given this rank's sizes.

`x.view(B, T, n_head, C // n_head)` says how many heads there are in all; a rank has some of them. Inference has followed every dim
through the code and knows for each call what has to change: a size, the bounds of a slice, an operand that every rank has whole and of
which it needs its part, a gradient or a result that is reduced over ranks. Where the module's own source shows those calls, it runs a copy
of its functions that hands them over (`core/modules/rewrite.py`). Otherwise a `TorchFunctionMode` looks up each call by its call site, which
costs a microsecond or two for each call of a torch function inside the module.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache, partial
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.overrides import TorchFunctionMode

from lightning_tp._compat import call_impl, intercept_functions, wrap_recomputed
from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.state import SEQUENCE, I
from lightning_tp.core.comm.transitions import outside
from lightning_tp.core.modules.call_site import MODULE_CALL, call_site, end_of, resumed
from lightning_tp.core.modules.rewrite import rewrite_methods
from lightning_tp.core.modules.swap_class import swap_class
from lightning_tp.core.ops.attention import WRITTEN_OUT, bind_attention, written_out
from lightning_tp.errors import TPError
from lightning_tp.styles.base import BindContext, Style
from lightning_tp.styles.calls.call import Call, call_from
from lightning_tp.styles.calls.run_call import run_call
from lightning_tp.styles.split import Split

# modules of the classes that a style or written-out attention puts around a module's own forward, whose source is then not the module's
_AROUND = ("lightning_tp.styles.", "lightning_tp.core.")


@dataclass(frozen=True)
class RewrittenCalls(Style):
    """Give single calls in a module's own forward this rank's sizes.

    Args:
        calls: what changes, in the order of the calls. Several at one call site are taken in turn.
    """

    name: ClassVar[str] = "local_ops"
    splits_parameters: ClassVar[bool] = False
    calls: tuple[Call, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "calls", tuple(c if isinstance(c, Call) else call_from(c) for c in self.calls))

    def splits(self, module: nn.Module, where: str, tp: int) -> dict[str, Split]:
        return {}

    def bind(self, module: nn.Module, site: BindContext) -> None:
        if isinstance(module, nn.MultiheadAttention):
            bind_attention(module, site.axis)
        if any(name == WRITTEN_OUT for call in self.calls for name, _ in call.at):
            swap_class(module, _WrittenOutAttention, _attention=written_out(site.axis))
        if not self.calls:
            return
        mixin = _rewritten_functions(type(module), self.calls)  # type: ignore[arg-type]  # as in `swap_class`
        if mixin is not None and not any(isinstance(m, type(module)) for m in module.modules() if m is not module):
            swap_class(module, mixin, _tp_calls=self.calls, _tp_call_axis=site.axis)
        else:
            swap_class(module, _UnderCallMode, _mode=_CallMode(self.calls, site.axis))

    def without_sequence(self) -> Style:
        calls = tuple(replace(c, to=I) if c.to == SEQUENCE else c for c in self.calls)
        of_sequence = -1  # the denominator of a size that is the length of the sequence
        calls = tuple(replace(c, sizes=()) if any(den == of_sequence for of in c.sizes for _, _, den in of) else c for c in calls)
        return replace(self, calls=calls)

    def options(self) -> dict[str, Any]:
        return {"calls": [{**asdict(c), "to": str(c.to)} for c in self.calls]} if self.calls else {}

    def __str__(self) -> str:
        names = dict.fromkeys(c.name for c in self.calls)
        return f"local_ops({len(self.calls)} calls: {', '.join(names)})"


class _WrittenOutAttention(nn.Module):
    """Writes out the attention that the module's own code calls as a function."""

    _attention: Callable[..., Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        functional = torch.nn.functional
        before, functional.multi_head_attention_forward = functional.multi_head_attention_forward, self._attention
        try:
            return super().forward(*args, **kwargs)
        finally:
            functional.multi_head_attention_forward = before


@lru_cache(maxsize=256)
def _rewritten_functions(cls: type[nn.Module], calls: tuple[Call, ...]) -> type | None:
    """Return a mixin with the functions of this class that hand these calls over; None if its source does not show them."""
    if any(c.__module__.startswith(_AROUND) for c in cls.__mro__):
        return None
    functions = rewrite_methods(cls, [(c.name, c.at) for c in calls], "_local_call")
    own = {"__call__": _UnderCallMode.__call__, "_local_call": _local_call}
    return None if functions is None else type("_RewrittenCalls", (nn.Module,), {**own, **functions})


def _local_call(self: Any, number: int, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run one of the module's changed calls: what the functions that `rewritten` makes call, as a method of the module."""
    call = self._tp_calls[number]
    owner = getattr(func, "__self__", None)
    if isinstance(owner, Tensor):
        args, func = (owner, *args), getattr(Tensor, call.name)
    running = _CallMode._running
    running.append(None)  # a mode around this module has no business with what is called here
    try:
        return run_call(call, func, args, kwargs, self._tp_call_axis)
    finally:
        running.pop()


class _UnderCallMode(nn.Module):
    _mode: _CallMode

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():  # compiled code has no call sites
            return outside(call_impl, self, *args, **kwargs)
        return call_impl(self, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._mode.turns.clear()
        _CallMode._running.append(self._mode)
        try:
            with self._mode:
                return super().forward(*args, **kwargs)
        finally:
            _CallMode._running.pop()


class _CallMode(TorchFunctionMode):
    """Looks up each call of a torch function while its module runs."""

    _running: ClassVar[list[_CallMode | None]] = []  # that of the module whose own code runs is the last

    def __init__(self, calls: tuple[Call, ...], axis: Axis) -> None:
        super().__init__()
        wrap_recomputed(_recomputed)
        if any(c.name == "apply" for c in calls):
            _see_functions()
        self.axis = axis
        self.table: dict[Any, list[Call]] = {}
        # (function of torch, innermost place) -> what all calls there become, whoever calls the code around them
        self.by_place: dict[Any, set[Call]] = {}
        for call in calls:
            self.table.setdefault((call.name, call.at), []).append(call)
            self.by_place.setdefault((call.name, call.at[:1]), set()).add(replace(call, at=()))
        self.names = frozenset(c.name for c in calls)
        self.turns: Counter[Any] = Counter()  # call site -> calls from there in this forward

    def __deepcopy__(self, memo: dict[int, Any]) -> _CallMode:
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name not in self.names or self._running[-1] is not self:
            return func(*args, **(kwargs or {}))
        call = None if name == "__get__" and func.__self__ is not Tensor.shape else self.call_at(name, sys._getframe(1))
        return func(*args, **(kwargs or {})) if call is None else run_call(call, func, args, kwargs or {}, self.axis)

    def call_at(self, name: str, frame: FrameType) -> Call | None:
        """Return what becomes of the call that a frame makes; None if nothing changes."""
        key = name, site = name, call_site(frame, _ENDS)
        calls = self.table.get(key)
        if (
            calls is None
            and len(anywhere := self.by_place.get((name, site[:1]), ())) == 1
            and end_of(frame, _ENDS) is not MODULE_CALL
        ):
            return next(iter(anywhere))  # the same code, called from a line that did not run when the plan was made
        if calls is None:
            return None
        if len(calls) == 1:
            return calls[0]
        turn = self.turns[key]  # one call site in a loop, or in a helper that is called several times
        self.turns[key] += 1
        return calls[turn] if turn < len(calls) else _call_at(calls, turn)


def _apply(cls: Any, apply: Callable[..., Any], args: Any, frame: FrameType) -> Any:
    """Run an `autograd.Function`, which no mode sees."""
    mode = _CallMode._running[-1] if _CallMode._running else None
    call = mode.call_at("apply", frame) if mode is not None and "apply" in mode.names else None
    return apply(*args) if mode is None or call is None else run_call(call, apply, args, {}, mode.axis)


@cache
def _see_functions() -> None:
    intercept_functions(_apply)


_ENDS = frozenset({MODULE_CALL, _UnderCallMode.forward.__code__})  # a forward that is recomputed begins at the second one


def _recomputed(function: Callable[..., Any], frame: FrameType) -> Callable[..., Any]:
    """Return what `checkpoint` recomputes in a backward pass, so that calls in it are changed as in the forward."""
    running = _CallMode._running
    mode = running[-1] if running else None
    if mode is None:
        return function
    return resumed(function, call_site(frame, _ENDS), partial(_again, mode, Counter(mode.turns)))


@contextmanager
def _again(mode: _CallMode, turns: Counter[Any]) -> Iterator[None]:
    running = _CallMode._running
    if running and running[-1] is mode:  # the forward
        yield
        return
    before, mode.turns = mode.turns, turns.copy()
    running.append(mode)
    try:
        with mode:
            yield
    finally:
        running.pop()
        mode.turns = before


def _call_at(calls: list[Call], turn: int) -> Call:
    """Return what becomes of a call that is made more often than when the plan was made.

    Raises:
        TPError: if the recorded calls neither come again in turns nor are equal but for the first ones.

    Example:
        >>> first, later = Call("einsum", ()), Call("einsum", (), leave=True)
        >>> [_call_at([first, later, later], 5) is later, _call_at([first, later, first, later], 4) is first]
        [True, True]
    """
    n = len(calls)
    period = next(k for k in range(1, n + 1) if n % k == 0 and calls == calls[:k] * (n // k))
    if period < n:
        return calls[turn % period]
    if calls[-1] == calls[-2]:  # a loop
        return calls[-1]
    raise TPError(
        f"`{calls[0].name}` is called more often than in the run that the plan was made from ({n} times): what becomes of it on a shard is not "
        "known. Infer the plan from a batch with which it is called as often (the longest sequence)."
    )


def changes_calls(mode: TorchFunctionMode) -> bool:
    """Return whether this mode is that of a module whose calls are changed."""
    return isinstance(mode, _CallMode)
