"""Sizes that code reads from shards: pairs of the full size and the size on each rank, followed through arithmetic.

A far smaller task than that of torch's `SymInt`: the run has concrete sizes, and all that is asked is whether code on a rank, with that rank's
number, would do the same.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch

Binary = Callable[[Any, Any], Any]


def _pair(op: Binary, *, swapped: bool = False) -> Any:
    """Return a method that computes with full and with local sizes."""

    def method(self: PerRankInt, other: Any) -> Any:
        if not isinstance(other, int):
            self.computed_with()
            return op(other, self.whole) if swapped else op(self.whole, other)
        ours, theirs = (self.whole, *self.local), (whole_of(other), *local_of(other, len(self.local)))
        whole, *local = map(op, theirs, ours) if swapped else map(op, ours, theirs)
        return PerRankInt.of(whole, tuple(local), self.reads | _reads_of(other))

    return method


def _decision(op: Binary) -> Any:
    """Return a method that compares full sizes, and notes where local ones compare otherwise."""

    def method(self: PerRankInt, other: Any) -> bool:
        out = bool(op(self.whole, whole_of(other)))
        if isinstance(other, (int, float)):
            theirs = other.local if isinstance(other, PerRankInt) else (other,) * len(self.local)
            if any(bool(op(a, b)) != out for a, b in zip(self.local, theirs, strict=True)):
                PerRankInt.diverging |= self.reads | _reads_of(other)
        return out

    return method


def _number(op: Callable[..., Any], *, swapped: bool = False) -> Any:
    """Return a method that computes with the full size as a number: code has to read the full one."""

    def method(self: PerRankInt, *others: Any) -> Any:
        self.computed_with()
        operands = [self.whole, *map(whole_of, others)]
        return op(*(reversed(operands) if swapped else operands))

    return method


def _floordiv(a: int, b: int) -> int:
    return a // b if b else 0


def _mod(a: int, b: int) -> int:
    return a % b if b else 0


class PerRankInt(int):
    """A size that differs between the full tensor and its shards.

    As an int it is the full size, which the run works with; while `shown` is a rank, the size on that rank. What code computes with it in ways
    that can't be seen (`range(n)`, an index into a list) then has another result.

    Attributes:
        whole: the full size.
        local: the size on each rank.
        reads: where code has read it.
        diverging: reads on which code decides or computes otherwise on a rank, in the recording that runs.
        shown: the rank whose sizes code is shown; None: full sizes.

    Example:
        >>> heads = PerRankInt.of(12, (6, 6)) // 3
        >>> (heads.whole, heads.local)
        (4, (2, 2))
    """

    whole: int
    local: tuple[int, ...]
    reads: frozenset[Any]
    diverging: set[Any] = set()  # noqa: RUF012  of the class, not of one number
    shown: int | None = None

    @classmethod
    def of(cls, value: int, local: tuple[int, ...], reads: frozenset[Any] = frozenset()) -> int:
        """Return a pair, or a plain int where there is no difference."""
        if all(x == value for x in local):
            return value
        made = cls(value if cls.shown is None else local[cls.shown])
        made.whole, made.local, made.reads = int(value), tuple(local), reads
        return made

    def computed_with(self) -> None:
        """Note that its value is used as a number, not as a size: code has to read the full one."""
        PerRankInt.diverging |= self.reads

    __add__ = __radd__ = _pair(operator.add)
    __mul__ = __rmul__ = _pair(operator.mul)
    __sub__, __rsub__ = _pair(operator.sub), _pair(operator.sub, swapped=True)
    __floordiv__, __rfloordiv__ = _pair(_floordiv), _pair(_floordiv, swapped=True)
    __mod__, __rmod__ = _pair(_mod), _pair(_mod, swapped=True)
    __lt__, __le__, __gt__, __ge__, __eq__, __ne__ = map(
        _decision, (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne)
    )
    __truediv__, __rtruediv__ = _number(operator.truediv), _number(operator.truediv, swapped=True)
    __pow__, __rpow__ = _number(pow), _number(pow, swapped=True)
    __float__, __int__, __str__, __repr__ = (_number(f) for f in (float, int, str, repr))

    def __neg__(self) -> Any:
        return self * -1

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def __hash__(self) -> int:
        return hash((self.whole, self.local))  # not that of the int: caches of code that computes with sizes must not mix them up


def _reads_of(n: Any) -> frozenset[Any]:
    return n.reads if isinstance(n, PerRankInt) else frozenset()


class LocalShape(tuple[int, ...]):
    """What code is given instead of `x.shape` of a shard."""

    def numel(self) -> int:
        out: int = 1
        for n in self:
            out = out * n
        return out


def whole_of(n: Any) -> Any:
    """Return what one process has where this run has `n`."""
    return n.whole if isinstance(n, PerRankInt) else n


def local_of(n: Any, tp: int) -> tuple[int, ...]:
    """Return what each rank's code would have where this run has `n`."""
    return n.local if isinstance(n, PerRankInt) else (int(n),) * tp


def fraction(num: int, den: int) -> tuple[int, int]:
    """Return the factor `num / den` in lowest terms; (num, 0) for a size that is set to `num`, as it can't be a multiple of 0."""
    return Fraction(num, den).as_integer_ratio() if den else (num, 0)


def mapped(x: Any, leaf: Callable[[Any], Any]) -> Any:
    """Return the arguments of a call with `leaf(n)` instead of each tensor and number."""
    if isinstance(x, LocalShape):
        sizes = [leaf(n) for n in x]
        if any(isinstance(n, PerRankInt) for n in sizes):
            return LocalShape(sizes)
        return torch.Size(sizes) if all(isinstance(n, int) for n in sizes) else tuple(sizes)
    if type(x) in (tuple, list):
        return type(x)(mapped(i, leaf) for i in x)
    if type(x) is dict:
        return {k: mapped(v, leaf) for k, v in x.items()}
    if isinstance(x, slice):
        return slice(*(mapped(i, leaf) for i in (x.start, x.stop, x.step)))
    return leaf(x)


def plain(x: Any) -> Any:
    """Return the arguments of a call with full sizes, which this run works with."""
    return mapped(x, whole_of)


def on_rank(x: Any, rank: int) -> Any:
    """Return the arguments of a call with the sizes that the code of this rank has."""
    return mapped(x, lambda n: n.local[rank] if isinstance(n, PerRankInt) else n)


def per_rank_ints(x: Any) -> tuple[PerRankInt, ...]:
    """Return the sizes of shards among the arguments of a call."""
    found: list[Any] = []
    mapped(x, found.append)
    return tuple(n for n in found if isinstance(n, PerRankInt))
