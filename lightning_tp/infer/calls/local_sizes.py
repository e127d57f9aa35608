"""Sizes that code reads from shards: pairs of the number that one process has and those of the ranks, followed through arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch


class PerRankInt(int):
    """A size that is another one on a rank: in `whole` that of one process, in `local` that of each rank, in `reads` where it was read.

    As an int it is the whole one, which this run works with; while `shown` is a rank, that rank's. What code computes with it in ways that
    can't be seen (`range(n)`, `int(n)`) then comes out otherwise.
    """

    whole: int
    local: tuple[int, ...]
    reads: frozenset[Any]
    diverging: set[Any] = set()  # noqa: RUF012  reads on which code decides otherwise on a rank; of the recording that runs
    shown: int | None = None

    @classmethod
    def of(cls, value: int, local: tuple[int, ...], reads: frozenset[Any] = frozenset()) -> int:
        """A plain int where there is no difference."""
        if all(x == value for x in local):
            return value
        made = cls(value if cls.shown is None else local[cls.shown])
        made.whole, made.local, made.reads = int(value), tuple(local), reads
        return made

    def computed_with(self) -> None:
        """Its value is used as a number, not as a size: code has to read the whole one."""
        PerRankInt.diverging |= self.reads

    def _with(self, other: Any, op: Any) -> Any:
        if not isinstance(other, int):
            self.computed_with()
            return op(self.whole, other)
        mine = other.local if isinstance(other, PerRankInt) else (other,) * len(self.local)
        reads = self.reads | (other.reads if isinstance(other, PerRankInt) else frozenset())
        local = tuple(op(a, b) for a, b in zip(self.local, mine, strict=True))
        return PerRankInt.of(op(self.whole, whole_of(other)), local, reads)

    def _compare(self, other: Any, op: Any) -> bool:
        out = bool(op(self.whole, whole_of(other)))
        if isinstance(other, (int, float)):
            mine = other.local if isinstance(other, PerRankInt) else (other,) * len(self.local)
            if any(op(a, b) != out for a, b in zip(self.local, mine, strict=True)):
                PerRankInt.diverging |= self.reads | (other.reads if isinstance(other, PerRankInt) else frozenset())
        return out

    def _number(self) -> int:
        self.computed_with()
        return self.whole

    def __mul__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: a * b)

    def __add__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: a + b)

    def __sub__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: a - b)

    def __rsub__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: b - a)

    def __floordiv__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: a // b if b else 0)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: b // a if a else 0)

    def __mod__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: a % b if b else 0)

    def __neg__(self) -> Any:
        return PerRankInt.of(-self.whole, tuple(-a for a in self.local), self.reads)

    __rmul__, __radd__ = __mul__, __add__

    def __lt__(self, other: Any) -> bool:
        return self._compare(other, lambda a, b: a < b)

    def __le__(self, other: Any) -> bool:
        return self._compare(other, lambda a, b: a <= b)

    def __gt__(self, other: Any) -> bool:
        return self._compare(other, lambda a, b: a > b)

    def __ge__(self, other: Any) -> bool:
        return self._compare(other, lambda a, b: a >= b)

    def __eq__(self, other: object) -> bool:
        return self._compare(other, lambda a, b: a == b)

    def __ne__(self, other: object) -> bool:
        return self._compare(other, lambda a, b: a != b)

    def __rmod__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: b % a if a else 0)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def __truediv__(self, other: Any) -> Any:
        return self._number() / whole_of(other)  # a number that the code computes with, not a size

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


class LocalShape(tuple[int, ...]):
    """What stands in for `x.shape` of a shard."""

    def numel(self) -> int:
        out: int = 1
        for n in self:
            out = out * n
        return out


def whole_of(n: Any) -> Any:
    """What one process has where this run has `n`."""
    return n.whole if isinstance(n, PerRankInt) else n


def local_of(n: Any, tp: int) -> tuple[int, ...]:
    """What each rank's code would have where this run has `n`."""
    return n.local if isinstance(n, PerRankInt) else (int(n),) * tp


def mapped(x: Any, leaf: Callable[[Any], Any]) -> Any:
    """What a call is given, with something else in place of its tensors and numbers."""
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
    """Without the local sizes: what this run works with."""
    return mapped(x, whole_of)


def on_rank(x: Any, rank: int) -> Any:
    """With the sizes that the code of this rank has."""
    return mapped(x, lambda n: n.local[rank] if isinstance(n, PerRankInt) else n)


def local_ints(x: Any) -> Iterator[PerRankInt]:
    """Those that a call is given."""
    if isinstance(x, PerRankInt):
        yield x
    elif isinstance(x, (tuple, list)):
        for i in x:
            yield from local_ints(i)
    elif isinstance(x, dict):
        yield from local_ints(tuple(x.values()))
    elif isinstance(x, slice):
        yield from local_ints((x.start, x.stop, x.step))
