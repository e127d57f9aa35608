"""A module whose own code has whole sizes in it, run on a rank's shards: single calls are given this rank's sizes.

`x.view(B, T, n_head, C // n_head)` says how many heads there are in all; a rank has some of them. Inference has followed every dim
through the code and knows for each call what has to change: a size, the bounds of a slice, an operand that every rank has whole and of
which it needs its part, a gradient or a result that is summed over ranks. Where the module's own source shows those calls, it runs a copy
of its functions that hands them over (`rewrite.py`). Else a `TorchFunctionMode` looks up each call by the place in the code that it comes
from, at a microsecond or two for each call of a torch function inside the module.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.overrides import TorchFunctionMode

from lightning_tp.comm import Axis, State, length_of, outside, replicate_to_gathered, transition
from lightning_tp.errors import TPError
from lightning_tp.styles.attention import WRITTEN_OUT, bind_attention, written_out
from lightning_tp.styles.base import Site, Split, Style, become, split_of_ranges
from lightning_tp.styles.rewrite import rewritten

SIZE_CALLS = frozenset({"view", "reshape", "expand", "unflatten", "broadcast_to", "repeat"})
WITH_BIAS: dict[str, Callable[..., Any]] = {"addmm": torch.mm, "baddbmm": torch.bmm, "addmv": torch.mv}
CONVOLUTIONS = frozenset(f"conv{way}{n}d" for way in ("", "_transpose") for n in (1, 2, 3))
COUNTS = frozenset({"numel", "nelement", "__len__"})
READS = frozenset({"__get__", "size"}) | COUNTS
FACTORIES = frozenset({"zeros", "ones", "empty", "full", "rand", "randn", "new_zeros", "new_ones", "new_empty", "new_full"})
FIRST_SIZE = {"unflatten": 2, "zeros": 0, "ones": 0, "empty": 0, "full": 0, "rand": 0, "randn": 0}  # else 1: behind the tensor
SPLIT_CALLS = frozenset({"split", "chunk", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split"})


@dataclass(frozen=True)
class Pattern:
    """Which rank has which index of a dim: runs of (rank, length), -1 for all ranks, repeated over the dim.

    Example:
        >>> Pattern(((0, 2), (1, 2))).index(rank=1, length=8).tolist()
        [2, 3, 6, 7]
    """

    runs: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", tuple((r, n) for r, n in self.runs))

    @classmethod
    def of(cls, owner: Tensor) -> Pattern:
        """From the rank of each index."""
        n = owner.numel()
        period = next(p for p in range(1, n + 1) if n % p == 0 and torch.equal(owner[p:], owner[:-p] if p < n else owner[n:]))
        ranks, lengths = torch.unique_consecutive(owner[:period], return_counts=True)
        return cls(tuple(zip(ranks.tolist(), lengths.tolist(), strict=True)))

    @property
    def period(self) -> int:
        """The length that is repeated."""
        return sum(n for _, n in self.runs)

    def count(self, rank: int) -> int:
        """How many of a period this rank has."""
        return sum(n for r, n in self.runs if r in (rank, -1))

    def local(self, length: int, rank: int) -> int:
        """How many of `length` this rank has."""
        return length // self.period * self.count(rank)

    def index(self, rank: int, length: int) -> Tensor:
        """The indices of a dim of this length that the rank has."""
        one = torch.cat([torch.full((n,), r in (rank, -1)) for r, n in self.runs])
        return one.repeat(length // self.period).nonzero().squeeze(1)

    def ranges(self, rank: int) -> tuple[tuple[int, int], ...]:
        """The (start, stop) ranges of one period that the rank has, neighbours joined."""
        spans: list[list[int]] = []
        at = 0
        for r, n in self.runs:
            if r in (rank, -1):
                if spans and spans[-1][1] == at:
                    spans[-1][1] = at + n
                else:
                    spans.append([at, at + n])
            at += n
        return tuple((a, b) for a, b in spans)


@dataclass(frozen=True)
class Operand:
    """What becomes of one tensor that a call is given.

    Args:
        path: where it stands: a position, or a name, then a position inside a list.
        part: (dim counted from the last, pattern) of which a rank needs its part.
        enter: its gradient is summed over the ranks, which work on their shares from here.
        beside: a split operand of the same call; code may have made this one in the size of its shard already.
    """

    path: tuple[int | str, ...]
    part: tuple[int, Pattern] | None = None
    enter: bool = False
    beside: tuple[int | str, ...] | None = None


@dataclass(frozen=True)
class Call:
    """What becomes of one call.

    Args:
        name: of the torch function.
        at: the place in the code; see `place`.
        operands: tensors that are changed before it.
        sizes: for each rank, (position among the sizes, numerator, denominator): a given size is multiplied; denominator 0 sets it, -1
            makes it the length of the sequence that is in shards.
        pieces: for each rank, the sizes that a split makes.
        items: for each rank, the (position, start, stop, step) of a slice in an index, and the length that it is taken of.
        leave: its result is a term of a sum over ranks; a bias among its arguments is added once.
        logits: its result stays split for the loss: the length of the vocabulary.
        groups: for each rank, how many groups of channels a convolution has.
        to: with `leave`, what the terms become: "replicate", "sequence" (this rank's tokens), or "partial" (terms, as they are).
    """

    name: str
    at: tuple[Any, ...]
    operands: tuple[Operand, ...] = ()
    sizes: tuple[tuple[tuple[int, int, int], ...], ...] = ()
    pieces: tuple[tuple[int, ...], ...] = ()
    items: tuple[tuple[int, ...], ...] = ()
    leave: bool = False
    logits: int | None = None
    groups: tuple[int, ...] = ()
    to: State = "replicate"

    @property
    def changes(self) -> bool:
        """Whether anything becomes of it: else it only holds its turn at a place in the code."""
        return bool(self.operands or self.sizes or self.pieces or self.items or self.leave or self.logits or self.groups)


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

    def bind(self, module: nn.Module, site: Site) -> None:
        if isinstance(module, nn.MultiheadAttention):
            bind_attention(module, site.axis)
        if any(name == WRITTEN_OUT for call in self.calls for name, _ in call.at):
            become(module, _Functional, _attention=written_out(site.axis))
        if not self.calls:
            return
        mixin = _own_functions(type(module), self.calls)  # type: ignore[arg-type]  # as in `become`
        if mixin is not None and not any(isinstance(m, type(module)) for m in module.modules() if m is not module):
            become(module, mixin, _calls=self.calls, _call_axis=site.axis)
        else:
            become(module, _LocalOps, _mode=_Mode(self.calls, site.axis))

    def __post_init__(self) -> None:
        object.__setattr__(self, "calls", tuple(c if isinstance(c, Call) else _call_of(c) for c in self.calls))

    def options(self) -> dict[str, Any]:
        return {"calls": [asdict(c) for c in self.calls]} if self.calls else {}

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


def _call_of(plain: dict[str, Any]) -> Call:
    """A call from plain data, as `LocalOps.options` gives it and JSON keeps it."""
    operands = tuple(
        Operand(
            _tuples(o["path"]),
            None if o["part"] is None else (o["part"][0], Pattern(_tuples(o["part"][1]["runs"]))),
            o["enter"],
            None if o["beside"] is None else _tuples(o["beside"]),
        )
        for o in plain["operands"]
    )
    rest = {k: _tuples(v) for k, v in plain.items() if k not in ("operands", "name")}
    return Call(plain["name"], operands=operands, **rest)


def _tuples(x: Any) -> Any:
    return tuple(_tuples(i) for i in x) if isinstance(x, (list, tuple)) else x


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
    functions = rewritten(cls, [(c.name, c.at) for c in calls], "_local_call")
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
        key = (name, place(sys._getframe(1)))
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


def run_call(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], axis: Axis) -> Any:
    """Make the call with what changes on this rank."""
    rank = axis.rank
    if call.name in READS:
        return _whole_read(call, args, kwargs, axis)
    if call.operands:
        args, kwargs = _with_operands(call, args, kwargs, axis)
    if call.sizes:
        args = _with_sizes(call, args, rank)
    if call.pieces:
        dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
        return torch.split(args[0], list(call.pieces[rank]), dim)
    if call.items:
        args = (args[0], _with_item(args[0], args[1], call.items[rank]))
    if call.groups and len(args) > 6:
        args = (*args[:6], call.groups[rank], *args[7:])
    elif call.groups:
        kwargs = {**kwargs, "groups": call.groups[rank]}
    if call.leave:
        bias = None
        if func is torch.nn.functional.linear or call.name in CONVOLUTIONS:
            bias = kwargs.pop("bias", None) if "bias" in kwargs else (args[2] if len(args) > 2 else None)
            args = args if len(args) < 3 else (*args[:2], None, *args[3:])
            if bias is not None and call.name in CONVOLUTIONS:
                weight = kwargs["weight"] if "weight" in kwargs else args[1]
                bias = bias.view(-1, *[1] * (weight.ndim - 2))  # beside the channels
        elif call.name in WITH_BIAS and len(args) == 3:  # input + product
            bias, *args = args  # type: ignore[assignment]
            bias = bias if kwargs.get("beta", 1) == 1 else bias * kwargs["beta"]
            args, func = (args[0] * kwargs.get("alpha", 1), args[1]), WITH_BIAS[call.name]
            kwargs = {}
        leave = transition("partial", call.to)
        out = func(*args, **kwargs)
        if leave is not None:
            out = leave(out, axis)
        elif bias is not None and rank:
            bias = bias * 0  # once among the terms; on all ranks it has a gradient
        return out if bias is None else out + bias
    out = func(*args, **kwargs)
    if call.logits is not None:
        from lightning_tp.loss import split_logits

        return split_logits(out, axis, call.logits)
    return out


def _whole_read(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], axis: Axis) -> Any:
    """The size that the code would read from the whole tensor."""
    sizes = list(args[0].size())
    for at, num, den in call.sizes[axis.rank] if call.sizes else ():
        if den == -1:
            sizes[at] = length_of(args[0], axis)
        else:
            sizes[at] = sizes[at] * num // den if den else num
    if call.name in COUNTS:
        return sizes[0] if call.name == "__len__" else math.prod(sizes)
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return torch.Size(sizes) if dim is None or call.name != "size" else sizes[dim]


def _with_operands(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], axis: Axis) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = args
    args, kwargs = (
        tuple(list(a) if isinstance(a, (list, tuple)) and not isinstance(a, torch.Size) else a for a in args),
        dict(kwargs),
    )
    new = list(args)
    for operand in call.operands:
        holder = _holder(operand.path, new, kwargs)
        x = holder[operand.path[-1]]
        if operand.enter and x.requires_grad:
            x = replicate_to_gathered(x, axis)
        if operand.part is not None and not _made_local(x, operand, new, kwargs):
            x = part_of(x, operand.part, axis.rank)
        holder[operand.path[-1]] = x
    return tuple(tuple(n) if isinstance(a, tuple) else n for n, a in zip(new, given, strict=True)), kwargs


def _holder(path: tuple[int | str, ...], args: list[Any], kwargs: dict[str, Any]) -> Any:
    """What the last step of a path looks into."""
    holder: Any = args if isinstance(path[0], int) else kwargs
    for step in path[:-1]:
        holder = holder[step]
    return holder


def _made_local(x: Tensor, operand: Operand, args: list[Any], kwargs: dict[str, Any]) -> bool:
    """Whether it has the size of the shard beside it already."""
    if operand.beside is None or operand.part is None:
        return False
    other = _holder(operand.beside, args, kwargs)[operand.beside[-1]]
    from_last = operand.part[0]
    return bool(x.ndim >= from_last and x.shape[-from_last] == other.shape[-from_last])


def part_of(x: Tensor, part: tuple[int, Pattern], rank: int) -> Tensor:
    """This rank's part of an operand that every rank has whole."""
    from_last, pattern = part
    dim = x.ndim - from_last
    if dim < 0 or x.shape[dim] == 1:
        return x
    ranges = pattern.ranges(rank)
    if x.shape[dim] == pattern.period and len(ranges) == 1:
        return x.narrow(dim, ranges[0][0], ranges[0][1] - ranges[0][0])
    if x.shape[dim] % pattern.period:
        raise TPError(
            f"An operand of shape {tuple(x.shape)}, of which this rank takes its part along dim {dim}: {x.shape[dim]} is no multiple of "
            f"{pattern.period}, as it was when the plan was made. Make the plan from inputs like these."
        )
    return x.index_select(dim, _index(pattern, rank, x.shape[dim], x.device))


@lru_cache(maxsize=256)
def _index(pattern: Pattern, rank: int, length: int, device: torch.device) -> Tensor:
    return pattern.index(rank, length).to(device)


def _with_sizes(call: Call, args: tuple[Any, ...], rank: int) -> tuple[Any, ...]:
    first = FIRST_SIZE.get(call.name, 1)
    packed = len(args) == first + 1 and isinstance(args[first], (tuple, list, torch.Size))
    sizes = list(args[first] if packed else args[first:])
    for at, num, den in call.sizes[rank]:
        if den == 0:
            sizes[at] = num
            continue
        if sizes[at] * num % den:
            raise TPError(
                f"`{call.name}{tuple(sizes)}`: size {sizes[at]} at {at} is not a multiple of {den}, as it was when the plan was made. Make the "
                "plan from inputs like these."
            )
        sizes[at] = sizes[at] * num // den
    return (*args[:first], tuple(sizes))


def _with_item(x: Tensor, item: Any, change: tuple[int, ...]) -> Any:
    position, start, stop, step, *length = change
    items = item if isinstance(item, tuple) else (item,)
    dim = dim_of_item(items, position, x.ndim)
    if length and dim is not None and x.shape[dim] != length[0]:
        raise TPError(
            f"A slice of a dim of {x.shape[dim]} on this rank, which had {length[0]} when the plan was made. Make the plan from inputs of as "
            "many sequences as these, or keep the weights of this module whole (`Rule(name, 'replicate')`)."
        )
    new = (*items[:position], slice(start, stop, step), *items[position + 1 :])
    return new if isinstance(item, tuple) else new[0]


def dim_of_item(items: Sequence[Any], position: int, ndim: int) -> int | None:
    """The dim that one part of an index `x[items]` is about; None for one that makes a dim, or for an ellipsis.

    Example:
        >>> dim_of_item((..., None, slice(0, 2)), 2, ndim=4)
        3
    """
    if items[position] is None or items[position] is Ellipsis:
        return None
    counts = [0 if i is None or i is Ellipsis else i.ndim if isinstance(i, Tensor) and i.dtype == torch.bool else 1 for i in items]
    rest = ndim - sum(counts) if any(i is Ellipsis for i in items[:position]) else 0
    return sum(counts[:position]) + rest


# ------------------------------------------------------------------------------------------------- places in the code

MODULE_CALL: CodeType = nn.Module._call_impl.__code__
_TORCH = str(torch.__path__[0])
_HERE = str(Path(__file__).parents[1])


def place(frame: FrameType | None, ends: frozenset[CodeType] = frozenset({MODULE_CALL})) -> tuple[Any, ...]:
    """The chain of (function, instruction) from a call of a torch function up to the forward of the module that runs.

    Two calls from one helper that come from different places are told apart. A function that calls itself counts once: a class whose
    `__init_subclass__` wraps `forward` has one wrapper more in each subclass, as the styles and FSDP2 make them.
    """
    chain: list[tuple[str, str]] = []
    while frame is not None:
        code = frame.f_code
        if code in ends:
            break
        if not _is_inner(code):
            here = code.co_name, _position(code, frame.f_lasti)
            if not chain or chain[-1] != here:
                chain.append(here)
        frame = frame.f_back
    return tuple(chain)


@lru_cache(maxsize=16384)
def _position(code: CodeType, instruction: int) -> str:
    """Where in its function an instruction stands in the source: Python replaces instructions by others as it runs them."""
    positions = getattr(code, "co_positions", None)  # Python 3.11 on
    found = next(islice(positions(), instruction // 2, None)) if positions is not None else ()
    if not found or None in found:
        return str(instruction)
    line, end_line, column, end_column = found
    return f"{line - code.co_firstlineno}:{column}-{end_line - code.co_firstlineno}:{end_column}"


@lru_cache(maxsize=4096)
def _is_inner(code: CodeType) -> bool:
    """Frames of torch's and of this package's machinery, which are not the same when a plan is made and when it runs."""
    file = code.co_filename
    if file.startswith(_TORCH):
        return "/nn/modules/" not in file or file.endswith("/module.py")
    return file.startswith(_HERE) and not file.endswith("/styles/attention.py")
