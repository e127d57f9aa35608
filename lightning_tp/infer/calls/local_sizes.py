"""Sizes that code reads from shards: pairs of the full size and the size on each rank, followed through arithmetic.

A far smaller task than that of torch's `SymInt`: the run has concrete sizes, and all that is asked is whether code on a rank, with that rank's
number, would do the same.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import torch

Binary = Callable[[Any, Any], Any]


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

    def _with(self, other: Any, op: Binary) -> Any:
        if not isinstance(other, int):
            self.computed_with()
            return op(self.whole, other)
        local = tuple(map(op, self.local, local_of(other, len(self.local))))
        return PerRankInt.of(op(self.whole, whole_of(other)), local, self.reads | _reads_of(other))

    def _compare(self, other: Any, op: Binary) -> bool:
        out = bool(op(self.whole, whole_of(other)))
        if isinstance(other, (int, float)):
            mine = other.local if isinstance(other, PerRankInt) else (other,) * len(self.local)
            if any(op(a, b) != out for a, b in zip(self.local, mine, strict=True)):
                PerRankInt.diverging |= self.reads | _reads_of(other)
        return out

    def _number(self) -> int:
        self.computed_with()
        return self.whole

    def __mul__(self, other: Any) -> Any:
        return self._with(other, operator.mul)

    def __add__(self, other: Any) -> Any:
        return self._with(other, operator.add)

    def __sub__(self, other: Any) -> Any:
        return self._with(other, operator.sub)

    def __floordiv__(self, other: Any) -> Any:
        return self._with(other, _floordiv)

    def __mod__(self, other: Any) -> Any:
        return self._with(other, _mod)

    __rmul__, __radd__ = __mul__, __add__

    def __rsub__(self, other: Any) -> Any:
        return self._with(other, _swapped(operator.sub))

    def __rfloordiv__(self, other: Any) -> Any:
        return self._with(other, _swapped(_floordiv))

    def __rmod__(self, other: Any) -> Any:
        return self._with(other, _swapped(_mod))

    def __neg__(self) -> Any:
        return PerRankInt.of(-self.whole, tuple(-a for a in self.local), self.reads)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def __lt__(self, other: Any) -> bool:
        return self._compare(other, operator.lt)

    def __le__(self, other: Any) -> bool:
        return self._compare(other, operator.le)

    def __gt__(self, other: Any) -> bool:
        return self._compare(other, operator.gt)

    def __ge__(self, other: Any) -> bool:
        return self._compare(other, operator.ge)

    def __eq__(self, other: object) -> bool:
        return self._compare(other, operator.eq)

    def __ne__(self, other: object) -> bool:
        return self._compare(other, operator.ne)

    # From here on it is a number that the code computes with, not a size.

    def __truediv__(self, other: Any) -> Any:
        return self._number() / whole_of(other)

    def __rtruediv__(self, other: Any) -> Any:
        return other / self._number()

    def __pow__(self, other: Any, mod: Any = None) -> Any:
        return pow(self._number(), whole_of(other), mod)

    def __rpow__(self, other: Any, mod: Any = None) -> Any:
        return pow(other, self._number(), mod)

    def __float__(self) -> float:
        return float(self._number())

    def __int__(self) -> int:
        return self._number()

    def __str__(self) -> str:
        return str(self._number())

    __repr__ = __str__

    def __hash__(self) -> int:
        return hash((self.whole, self.local))  # not that of the int: caches of code that computes with sizes must not mix them up


def _floordiv(a: int, b: int) -> int:
    return a // b if b else 0


def _mod(a: int, b: int) -> int:
    return a % b if b else 0


def _swapped(op: Binary) -> Binary:
    return lambda a, b: op(b, a)


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


def per_rank_ints(x: Any) -> Iterator[PerRankInt]:
    """Yield the sizes of shards among the arguments of a call."""
    if isinstance(x, PerRankInt):
        yield x
    elif isinstance(x, (tuple, list)):
        for i in x:
            yield from per_rank_ints(i)
    elif isinstance(x, dict):
        yield from per_rank_ints(tuple(x.values()))
    elif isinstance(x, slice):
        yield from per_rank_ints((x.start, x.stop, x.step))
