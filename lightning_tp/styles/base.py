"""What a style is: how one module's parameters are split, and how the module runs on its shards.

A style is an immutable value with a name and a few options. It answers three questions, always by the same three methods:
`splits` (which part of each parameter does each rank hold, decided from sizes alone), `bind` (make the module run on its
shards, after its parameters were split) and `to_torch` (the same thing as a `ParallelStyle` of
`torch.distributed.tensor.parallel`). No style calls a collective: it names what arrives and what is wanted, and `comm.py` has
the pair that does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from types import CellType, FunctionType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_tp.comm import Axis, even_shard
from lightning_tp.errors import TPError

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Split:
    """How one parameter lies on the tensor-parallel axis.

    Args:
        dim: the dim that is split; None where every rank holds the whole.
        ranges: for each rank the (start, stop) ranges of `dim` that it holds, in the order in which it holds them. A fused
            weight has one for each part; ranks that share key/value heads have the same.
        sum_over: the gradients of this many neighbouring ranks are shares of one gradient, and are summed: tp for a
            replicated parameter that works on sharded activations, less for shared heads, 1 where each rank has it all.
        sum_rows: the local (start, stop) along `dim` that `sum_over` is about; None means all.
    """

    dim: int | None = None
    ranges: tuple[Ranges, ...] = ()
    sum_over: int = 1
    sum_rows: tuple[int, int] | None = None

    def length(self, rank: int) -> int:
        """How many indices of `dim` this rank holds."""
        return sum(stop - start for start, stop in self.ranges[rank])

    def local_shape(self, shape: Sequence[int], rank: int) -> tuple[int, ...]:
        """The shape that `rank` holds of a parameter of this whole shape."""
        if self.dim is None:
            return tuple(shape)
        return (*shape[: self.dim], self.length(rank), *shape[self.dim + 1 :])

    def take(self, whole: Tensor, rank: int) -> Tensor:
        """This rank's piece of the whole tensor, as a tensor of its own."""
        if self.dim is None:
            return whole.clone()
        pieces = [whole.narrow(self.dim, start, stop - start) for start, stop in self.ranges[rank]]
        if len(pieces) == 1:
            return pieces[0].clone(memory_format=torch.contiguous_format)
        return torch.cat(pieces, self.dim)

    def put(self, whole: Tensor, local: Tensor, rank: int) -> None:
        """Write this rank's piece into its place in the whole tensor: the inverse of `take`."""
        if self.dim is None:
            whole.copy_(local)
            return
        at = 0
        for start, stop in self.ranges[rank]:
            whole.narrow(self.dim, start, stop - start).copy_(local.narrow(self.dim, at, stop - start))
            at += stop - start

    @property
    def is_even_chunks(self) -> bool:
        """Whether it is what torch's `Shard(dim)` means: one range a rank, in order, as `torch.chunk` cuts."""
        if self.dim is None:
            return True
        tp, length = len(self.ranges), max((stop for r in self.ranges for _, stop in r), default=0)
        even = [even_shard(length, r, tp) for r in range(tp)]
        return all(
            len(r) == 1 and (r[0] == (e.start, e.stop) or len(e) == 0 == r[0][1] - r[0][0])
            for r, e in zip(self.ranges, even, strict=True)
        )


def even_split(length: int, dim: int, tp: int) -> Split:
    """Cut a dim of any length in tp shards as even as `torch.chunk` does.

    Example:
        >>> even_split(341, 0, 2).ranges
        (((0, 171),), ((171, 341),))
    """
    return Split(dim, tuple(((r.start, r.stop),) for r in (even_shard(length, rank, tp) for rank in range(tp))))


def head_split(length: int, dim: int, tp: int, heads: int, *, offset: int = 0) -> Split:
    """Cut a dim made of `heads` equal heads: whole heads to each rank, shared by neighbouring ranks where there are fewer than tp.

    The caller has checked that one of heads and tp divides the other.

    Example:
        >>> head_split(32, 0, 4, heads=2)
        Split(dim=0, ranges=(((0, 16),), ((0, 16),), ((16, 32),), ((16, 32),)), sum_over=2, sum_rows=None)
    """
    head = length // heads
    if heads >= tp:
        mine = [(r * heads // tp * head, (r + 1) * heads // tp * head) for r in range(tp)]
    else:
        mine = [(r * heads // tp * head, (r * heads // tp + 1) * head) for r in range(tp)]
    ranges = tuple(((offset + start, offset + stop),) for start, stop in mine)
    return Split(dim, ranges, sum_over=max(1, tp // heads))


def split_of_ranges(ranges: tuple[Ranges, ...], dim: int) -> Split:
    """The split in which each rank has these ranges of `dim`; what several ranks have is summed over them.

    Example:
        >>> split_of_ranges((((0, 2), (4, 5)), ((2, 4), (4, 5))), 0).sum_rows
        (2, 3)
    """
    return _split_of_ranges(tuple(tuple((a, b) for a, b in of) for of in ranges), dim)


@lru_cache(maxsize=1024)  # blocks that repeat have equal ones
def _split_of_ranges(ranges: tuple[Ranges, ...], dim: int) -> Split:
    tp = len(ranges)
    held = [{i for a, b in of for i in range(a, b)} for of in ranges]
    common = set.intersection(*held) if tp > 1 else set()
    if sum(map(len, held)) == len(set.union(*held)) + (tp - 1) * len(common) and common:
        places = [[n for n, i in enumerate(i for a, b in of for i in range(a, b)) if i in common] for of in ranges]
        first = places[0]
        if all(p == first for p in places) and first == list(range(first[0], first[-1] + 1)):
            return Split(dim, ranges, sum_over=tp, sum_rows=(first[0], first[-1] + 1))
        raise TPError(f"Ranks share {len(common)} indices that do not lie at one place on all of them.")
    return Split(dim, ranges)


def check_heads(where: str, heads: int, query_heads: int, length: int, tp: int) -> None:
    """Refuse a tp that would cut through a head.

    Raises:
        TPError: it names the sizes of tp that work.
    """
    if length % heads:
        raise TPError(f"`{where}`: {length} features are not {heads} equal heads. Say how many there are with `heads=`.")
    fits = [t for t in range(1, query_heads + 1) if query_heads % t == 0 and (heads % t == 0 or t % heads == 0)]
    if tp in fits:
        return
    what = f"{heads} heads" if heads == query_heads else f"{heads} key/value heads (of {query_heads} heads)"
    usable = ", ".join(str(t) for t in fits)
    raise TPError(
        f"`{where}`: {what} do not split over tp={tp}"
        + (f": tp is larger than the {query_heads} heads" if tp > query_heads else "")
        + f". Use tp={usable}, or keep this module whole on every rank with `replicate`."
    )


@dataclass(frozen=True)
class Site:
    """Where a style is bound: the module's name, the axis, and what the plan says of the whole model."""

    where: str
    axis: Axis
    loss_parallel: bool = True


@dataclass(frozen=True)
class Style:
    """Base of all styles: subclass it to split a module in a way of your own, and put an instance in a plan."""

    name: ClassVar[str] = ""
    splits_parameters: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for f in fields(self):  # JSON has lists for tuples; a style is hashable
            if isinstance(value := getattr(self, f.name), (list, tuple)):
                object.__setattr__(self, f.name, _as_tuples(value))

    def splits(self, module: nn.Module, where: str, tp: int) -> dict[str, Split]:
        """How each parameter below `module` is split, by its name inside the module.

        Raises:
            TPError: if this style can't be used on this module, or its sizes don't fit tp.
        """
        raise NotImplementedError

    def bind(self, module: nn.Module, site: Site) -> None:
        """Make the module run on its shards; its parameters are this rank's already."""

    def to_torch(self, module: nn.Module) -> ParallelStyle | None:
        """The same as a style for `torch.distributed.tensor.parallel.parallelize_module`; None where it needs none."""
        return None

    def options(self) -> dict[str, Any]:
        """What differs from the defaults, as plain data."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default}

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.options().items() if k != "ranges")
        return f"{self.name}({options})" if options else self.name


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def become(module: nn.Module, mixin: type, **attributes: Any) -> None:
    """Let this one module run through `mixin.forward`: a subclass of its own class, as FSDP2 does it.

    Replacing the class costs nothing at run time (a hook does), and survives `copy.deepcopy` (a replaced `forward` does not). A mixin that
    is a layer itself (an `nn.Embedding`) takes that layer's place under the module's class: what a subclass adds stays.
    """
    try:
        module.__class__ = _subclass(mixin, type(module))  # type: ignore[arg-type]  # a class is hashable, whatever its instances are
    except TypeError:  # "object layout differs": its class has other bases before nn.Module
        module.__class__ = _grafted(mixin, type(module))  # type: ignore[arg-type]
    for name, value in attributes.items():
        module.__dict__[name] = value


@cache
def _subclass(mixin: type, cls: type) -> type:
    layer = mixin.__mro__[1]
    beneath = layer is nn.Embedding and layer is not cls and issubclass(cls, layer)
    bases = (cls, mixin) if beneath else (mixin,) if issubclass(mixin, cls) else (mixin, cls)
    return type(f"{mixin.__name__.removeprefix('_')}{cls.__name__}", bases, {"__module__": cls.__module__})


@cache
def _grafted(mixin: type, cls: type) -> type:
    """A subclass of `cls` alone, with the functions of `mixin`, whose `super()` is `cls`."""
    made = type(f"{mixin.__name__.removeprefix('_')}{cls.__name__}", (cls,), {"__module__": cls.__module__})
    for name, f in vars(mixin).items():
        if isinstance(f, FunctionType):
            cells = zip(f.__code__.co_freevars, f.__closure__ or (), strict=True)
            closure = tuple(CellType(made) if n == "__class__" else c for n, c in cells)
            twin = FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, closure)
            twin.__kwdefaults__ = f.__kwdefaults__
            setattr(made, name, twin)
    return made


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is the linear layer of transformers that has its weight transposed, (in, out); told by its name, for it is not imported."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and isinstance(weight, Tensor) and weight.ndim == 2


def linear_dims(module: nn.Module, where: str, style: str) -> tuple[int, int, torch.Size]:
    """(dim of the output features, dim of the input features, shape) of a linear layer's weight.

    `nn.Linear` has (out, in), the `Conv1D` of transformers (in, out).

    Raises:
        TPError: if the module is no linear layer.
    """
    if isinstance(module, nn.Linear):
        return 0, 1, module.weight.shape
    if is_conv1d(module):
        weight: Any = module.weight
        return 1, 0, weight.shape
    raise TPError(
        f"`{where}`: the style `{style}` splits a linear layer, and this is a {type(module).__name__}. Use `replicate` for it, "
        "name the linear layers inside it, or write a style of your own (a subclass of lightning_tp.styles.Style)."
    )


def check_state(style: Style, option: str, allowed: tuple[str, ...], where: str) -> None:
    """Refuse a state that this style has no transition for; None is left to the plan.

    Raises:
        TPError: it names the states that there are.
    """
    state = getattr(style, option)
    if state is not None and state not in allowed:
        raise TPError(f"`{where}`: `{style.name}` has no `{option}={state!r}`. There is {' or '.join(map(repr, allowed))}.")


def set_sizes(module: nn.Module, **sizes: int) -> int:
    """Let the sizes that a layer shows (`out_features`, `nf`, ..) be those of the shard that it now holds; returns the size before."""
    before = 0
    for name, size in sizes.items():
        if hasattr(module, name):
            before = int(getattr(module, name))
            setattr(module, name, size)
    return before
