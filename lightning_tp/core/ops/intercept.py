"""Intercept the calls of torch functions that draw random numbers: those of a whole training step, or those of single modules.

There are two ways. A `TorchFunctionMode` sees the calls of all torch functions, at about a microsecond each. Wrappers that take the place of
`F.dropout` and `F.scaled_dot_product_attention` while one module runs cost nothing elsewhere, but miss code that holds these functions under
another name. An observed step has both; a module whose calls are known has the cheaper one that sees them.

A call is known by its place in the code of a module's forward (`call_site`). Compiled code has no places: these modules run uncompiled.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial, wraps
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.overrides import TorchFunctionMode

from lightning_tp._compat import call_impl, function_modes
from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.transitions import outside
from lightning_tp.core.modules.call_site import MODULE_CALL, call_site
from lightning_tp.core.modules.swap_class import swap_class
from lightning_tp.core.ops.exact_dropout import DropoutRegion
from lightning_tp.core.ops.random_calls import FUNCTIONAL, RANDOM_FUNCTIONS, FunctionCall
from lightning_tp.core.ops.replication import CallKey, NoiseTracker
from lightning_tp.core.ops.rng import on_rank_stream


class CallInterceptor:
    """Intercepts the calls of torch functions that draw random numbers; what becomes of them is up to a subclass, `RandomCallPolicy`.

    Args:
        axis: the tensor-parallel axis.

    Attributes:
        mode_active: the `TorchFunctionMode` is on.
        running: the per-rank calls of the modules that run now, those of the innermost last.
        functional_name: the wrapper that is passing a call on to the mode.
        noise: random numbers that have not met an activation yet.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.mode = _Mode(self)
        self.mode_active = False
        self.running: list[dict[CallKey, PerRankCall]] = []
        self.functional_name: str | None = None
        self.noise = NoiseTracker()
        self.wrappers = {name: self._wrapper(name, func) for name, func in FUNCTIONAL.items()}
        self.originals = {self.wrappers[name]: func for name, func in FUNCTIONAL.items()}
        self._inside_call = False  # what torch calls inside of a random call, by whatever name, is part of it

    def run_random_call(self, call: FunctionCall, frame: FrameType) -> Any:
        """Make a call of a function that draws; `frame` is the code that calls it."""
        raise NotImplementedError

    def run_other_call(self, call: FunctionCall) -> Any:
        """Make a call of another function, while noise has not met an activation yet."""
        raise NotImplementedError

    @contextlib.contextmanager
    def all_calls(self) -> Iterator[None]:
        """Intercept every call until this exits; what users have compiled runs uncompiled meanwhile."""
        uncompiled = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
        self.mode_active = True
        try:
            with self.mode, _in_functional(self.wrappers), uncompiled:
                yield
        finally:
            self.mode_active = self._inside_call = False
            self.running.clear()

    def run(self, call: FunctionCall, frame: FrameType) -> Any:
        """Intercept one call, and none of those that torch makes inside of it."""
        if self._inside_call:
            return call.run()
        self._inside_call = True
        try:
            return self.run_random_call(call, frame)
        finally:
            self._inside_call = False

    def _wrapper(self, name: str, func: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(func)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self._inside_call:
                return func(*args, **kwargs)
            if not self.mode_active:
                return self.run(FunctionCall(func, args, kwargs), sys._getframe(1))
            self.functional_name = name
            try:
                return func(*args, **kwargs)  # comes to the mode
            finally:
                self.functional_name = None

        wrapper._tp_intercepts = True  # type: ignore[attr-defined]
        return wrapper


class _Mode(TorchFunctionMode):
    def __init__(self, interceptor: CallInterceptor) -> None:
        super().__init__()
        self.interceptor = interceptor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = self.interceptor.originals.get(func, func)  # Python code of torch finds the wrapper under the function's name
        if func in RANDOM_FUNCTIONS:
            return self.interceptor.run(FunctionCall(func, args, kwargs or {}), sys._getframe(1))
        if self.interceptor.noise:
            return self.interceptor.run_other_call(FunctionCall(func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def is_intercepting() -> bool:
    """Return whether calls are intercepted now, which they could not be in compiled code."""
    in_functional = any(hasattr(F.__dict__[name], "_tp_intercepts") for name in FUNCTIONAL)
    return in_functional or any(isinstance(mode, _Mode) for mode in function_modes())


@contextlib.contextmanager
def _in_functional(functions: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Put functions into `torch.nn.functional`, until this exits."""
    namespace = F.__dict__
    before = {name: namespace[name] for name in functions}
    namespace.update(functions)
    try:
        yield
    finally:
        namespace.update(before)


@dataclass(frozen=True)
class PerRankCall:
    """A call that draws random numbers for this rank's shard."""

    functional_name: str | None = None  # under which the code calls a function of `torch.nn.functional`; None if it imported it
    region: DropoutRegion | None = None  # with `dropout="exact"`: what the shard is of the full activation


@dataclass
class PerRankCalls:
    """The per-rank calls of one module, which has them as its attribute `_per_rank_calls`."""

    interceptor: CallInterceptor
    calls: dict[CallKey, PerRankCall] = field(default_factory=dict)
    functional_names: set[str] | None = field(default_factory=set)  # wrappers that see all these calls; None if only the mode does

    def add(self, key: CallKey, call: PerRankCall) -> None:
        """Intercept this call from now on."""
        self.calls[key] = call
        if self.functional_names is not None and call.functional_name is not None and call.region is None:
            self.functional_names.add(call.functional_name)
        else:
            self.functional_names = None


@contextlib.contextmanager
def _intercepted(known: PerRankCalls) -> Iterator[None]:
    """Intercept the per-rank calls of a module that runs, until this exits."""
    interceptor, names = known.interceptor, known.functional_names
    by_mode = names is None and not interceptor.mode_active
    if by_mode:
        context: Any = interceptor.mode
    else:
        context = _in_functional({} if interceptor.mode_active else {n: interceptor.wrappers[n] for n in names or ()})
    interceptor.running.append(known.calls)
    interceptor.mode_active |= by_mode
    try:
        with context:
            yield
    finally:
        if by_mode:
            interceptor.mode_active = False
        if interceptor.running:
            interceptor.running.pop()


def per_rank_calls_of(module: nn.Module) -> dict[CallKey, PerRankCall]:
    """Return the calls in a module's forward that are known to draw for this rank's shard."""
    known: PerRankCalls | None = module.__dict__.get("_per_rank_calls")
    return {} if known is None else known.calls


def intercept_call(module: nn.Module, key: CallKey, call: PerRankCall, interceptor: CallInterceptor) -> None:
    """Intercept a call in a module's forward in every step from now on, and where activation checkpointing recomputes it."""
    if "_per_rank_calls" not in module.__dict__:
        is_dropout = type(module).forward is nn.Dropout.forward and call.region is None
        swap_class(module, _PerRankDropout if is_dropout else _Intercepted, _per_rank_calls=PerRankCalls(interceptor))
    module.__dict__["_per_rank_calls"].add(key, call)


class _Intercepted(nn.Module):
    """A module with calls that draw for this rank's shard."""

    _per_rank_calls: PerRankCalls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return outside(call_impl, self, *args, **kwargs)
        return super().__call__(*args, **kwargs)  # which may be that of an entry of the model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _intercepted(self._per_rank_calls):
            return super().forward(*args, **kwargs)


class _PerRankDropout(nn.Module):
    """An `nn.Dropout` of shards: its only call need not be intercepted."""

    _per_rank_calls: PerRankCalls
    p: float

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return outside(call_impl, self, *args, **kwargs)
        return super().__call__(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        interceptor = self._per_rank_calls.interceptor
        if interceptor.mode_active or not self.training or not self.p:
            with _intercepted(self._per_rank_calls):
                return super().forward(x)
        return on_rank_stream(interceptor.axis.rank, x.device, partial(super().forward, x))


def run_checkpointed(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run the forward of a block under activation checkpointing, with its calls intercepted both times that it runs."""
    if "_per_rank_calls" not in block.__dict__:
        return forward(*args, **kwargs)
    with _intercepted(block.__dict__["_per_rank_calls"]):
        return forward(*args, **kwargs)


_FORWARDS = frozenset({MODULE_CALL, run_checkpointed.__code__})  # code that calls the forward of a module


def key_of(call: FunctionCall, frame: FrameType) -> CallKey:
    """Return what a call is known by: the function's name, and the place in the code of a module's forward that calls it."""
    return call.name, call_site(frame, _FORWARDS)


def module_calling(frame: FrameType | None) -> tuple[nn.Module | None, bool]:
    """Return the module whose forward runs, and whether `torch.utils.checkpoint` runs a mere function inside of it."""
    function_only = False
    while frame is not None:
        if frame.f_code in _FORWARDS:
            return frame.f_locals["self" if frame.f_code is MODULE_CALL else "block"], function_only
        function_only |= frame.f_code.co_filename == torch.utils.checkpoint.__file__
        frame = frame.f_back
    return None, function_only
