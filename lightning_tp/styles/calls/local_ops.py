"""A module whose own code has whole sizes in it, run on a rank's shards: single calls are given this rank's sizes.

`x.view(B, T, n_head, C // n_head)` says how many heads there are in all; a rank has some of them. Inference has followed every dim
through the code and knows for each call what has to change: a size, the bounds of a slice, an operand that every rank has whole and of
which it needs its part, a gradient or a result that is summed over ranks. Where the module's own source shows those calls, it runs a copy
of its functions that hands them over (`rewrite.py`). Else a `TorchFunctionMode` looks up each call by the place in the code that it comes
from, at a microsecond or two for each call of a torch function inside the module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.overrides import TorchFunctionMode

from lightning_tp.core.comm.axis import Axis
from lightning_tp.core.comm.state import SEQUENCE, I
from lightning_tp.core.comm.transitions import outside
from lightning_tp.core.modules.call_site import call_site
from lightning_tp.core.modules.rewrite import rewrite_methods
from lightning_tp.core.modules.swap_class import swap_class
from lightning_tp.core.ops.attention import WRITTEN_OUT, bind_attention, written_out
from lightning_tp.styles.base import BindContext, Style
from lightning_tp.styles.calls.call import Call, _call_of
from lightning_tp.styles.calls.run_call import run_call
from lightning_tp.styles.split import Split, split_of_ranges


@dataclass(frozen=True)
class LocalOps(Style):
    """Give single calls in a module's own forward this rank's sizes.

    Args:
        calls: what changes, in the order of the calls. Two at one place in the code are taken in turn.
    """

    name: ClassVar[str] = "local_ops"
    splits_parameters: ClassVar[bool] = False
    calls: tuple[Call, ...] = ()

    def splits(self, module: nn.Module, where: str, tp: int) -> dict[str, Split]:
        return {}

    def bind(self, module: nn.Module, site: BindContext) -> None:
        if isinstance(module, nn.MultiheadAttention):
            bind_attention(module, site.axis)
        if any(name == WRITTEN_OUT for call in self.calls for name, _ in call.at):
            swap_class(module, _Functional, _attention=written_out(site.axis))
        if not self.calls:
            return
        mixin = _own_functions(type(module), self.calls)  # type: ignore[arg-type]  # as in `swap_class`
        if mixin is not None and not any(isinstance(m, type(module)) for m in module.modules() if m is not module):
            swap_class(module, mixin, _calls=self.calls, _call_axis=site.axis)
        else:
            swap_class(module, _LocalOps, _mode=_Mode(self.calls, site.axis))

    def without_sequence(self) -> Style:
        calls = tuple(replace(c, to=I) if c.to == SEQUENCE else c for c in self.calls)
        of_sequence = -1  # the denominator of a size that is the length of the sequence
        calls = tuple(replace(c, sizes=()) if any(den == of_sequence for of in c.sizes for _, _, den in of) else c for c in calls)
        return replace(self, calls=calls)

    def __post_init__(self) -> None:
        object.__setattr__(self, "calls", tuple(c if isinstance(c, Call) else _call_of(c) for c in self.calls))

    def options(self) -> dict[str, Any]:
        return {"calls": [{**asdict(c), "to": str(c.to)} for c in self.calls]} if self.calls else {}

    def __str__(self) -> str:
        names = dict.fromkeys(c.name for c in self.calls)
        return f"local_ops({len(self.calls)} calls: {', '.join(names)})"


@dataclass(frozen=True)
class ShardParameter(Style):
    """Split one parameter by itself, as the code of its module needs it.

    Args:
        dim: the dim that is split.
        ranges: for each rank the (start, stop) ranges of it.
    """

    name: ClassVar[str] = "shard"
    dim: int = 0
    ranges: tuple[tuple[tuple[int, int], ...], ...] = ()

    def split(self, tp: int) -> Split:
        """The same as a `Split`."""
        return split_of_ranges(self.ranges, self.dim)

    def splits(self, module: nn.Module, where: str, tp: int) -> dict[str, Split]:
        return {name: self.split(tp) for name, _ in module.named_parameters()}


class _Functional(nn.Module):
    """Writes out the attention that the module's own code calls as a function."""

    _attention: Callable[..., Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        of = torch.nn.functional
        before, of.multi_head_attention_forward = of.multi_head_attention_forward, self._attention
        try:
            return super().forward(*args, **kwargs)
        finally:
            of.multi_head_attention_forward = before


class _LocalOps(nn.Module):
    _mode: _Mode

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():  # a call is known by its place in the code
            return outside(self._call_impl, *args, **kwargs)
        return self._call_impl(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mode = self._mode
        mode.begin()
        try:
            with mode:
                return super().forward(*args, **kwargs)
        finally:
            mode.end()


def _local_call(self: Any, number: int, func: Any, *args: Any, **kwargs: Any) -> Any:
    """What the functions that `rewrite.py` makes call: a method of the module."""
    call = self._calls[number]
    of = getattr(func, "__self__", None)
    if isinstance(of, Tensor):
        args, func = (of, *args), getattr(Tensor, call.name)
    running = _Mode._running
    running.append(None)  # a mode around this module has no business with what is called here
    try:
        return run_call(call, func, args, kwargs, self._call_axis)
    finally:
        running.pop()


@lru_cache(maxsize=256)
def _own_functions(cls: type[nn.Module], calls: tuple[Call, ...]) -> type | None:
    """A mixin with the functions of this class that hand these calls over; None if its source does not show them."""
    if any(c.__module__.startswith(f"{__package__}.") for c in cls.__mro__):
        return None  # another style runs around its forward
    functions = rewrite_methods(cls, [(c.name, c.at) for c in calls], "_local_call")
    own = {"__call__": _LocalOps.__call__, "_local_call": _local_call}
    return None if functions is None else type("_LocalOps", (nn.Module,), {**own, **functions})


class _Mode(TorchFunctionMode):
    """Looks up each call of a torch function while its module runs."""

    _running: ClassVar[list[_Mode | None]] = []  # the module whose own code runs is the last

    def __init__(self, calls: tuple[Call, ...], axis: Axis) -> None:
        super().__init__()
        self.axis = axis
        self.table: dict[Any, list[Call]] = {}
        for call in calls:
            self.table.setdefault((call.name, call.at), []).append(call)
        self.names = frozenset(c.name for c in calls)
        self.seen: dict[Any, int] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Mode:
        return self

    def begin(self) -> None:
        """The module's forward begins."""
        self._running.append(self)
        self.seen.clear()

    def end(self) -> None:
        """It ended."""
        self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name not in self.names or self._running[-1] is not self:
            return func(*args, **(kwargs or {}))
        key = (name, call_site(sys._getframe(1)))
        calls = self.table.get(key)
        if calls is None or (name == "__get__" and func.__self__ is not Tensor.shape):
            return func(*args, **(kwargs or {}))
        if len(calls) == 1:
            call = calls[0]
        else:  # one place in a loop, or in a helper that is called several times
            turn = self.seen.get(key, 0)
            self.seen[key] = turn + 1
            call = calls[turn % len(calls)]
        return run_call(call, func, args, kwargs or {}, self.axis)


def changes_calls(mode: TorchFunctionMode) -> bool:
    """Whether this mode is that of a module whose calls are changed."""
    return isinstance(mode, _Mode)
