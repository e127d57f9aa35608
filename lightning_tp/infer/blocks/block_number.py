"""Notice whether code does anything with a block's own number that could make this block differ from the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

OPERATIONS = (
    "eq", "ne", "lt", "le", "gt", "ge", "hash", "bool", "int", "float", "str", "repr", "format", "index", "neg",
    "add", "radd", "sub", "rsub", "mul", "rmul", "mod", "rmod", "divmod", "pow", "floordiv", "rfloordiv", "truediv", "rtruediv",
    "and", "rand", "or", "xor", "lshift", "rshift",
)  # fmt: skip


class WatchedNumber(int):
    """A block's number that notes the operations it takes part in: comparisons, arithmetic, hashing, printing.

    Used as the index of a list it goes unnoticed: what blocks store per layer, such as a cache of keys and values, is indexed by it.

    Args:
        value: the number.
        uses: the list to which names of operations are appended.

    Example:
        >>> uses = []
        >>> number = WatchedNumber(1, uses)
        >>> ["first", "second"][number], uses
        ('second', [])
        >>> number == 0, uses
        (False, ['__eq__'])
    """

    uses: list[str]

    def __new__(cls, value: int, uses: list[str] | None = None) -> WatchedNumber:
        number = super().__new__(cls, value)
        number.uses = [] if uses is None else uses  # none where it is copied: its attributes follow
        return number


def _noting(name: str) -> Any:
    operation = getattr(int, name)

    def method(self: WatchedNumber, *args: Any) -> Any:
        self.uses.append(name)
        return operation(int.__int__(self), *args)

    return method


for _name in (f"__{operation}__" for operation in OPERATIONS):
    setattr(WatchedNumber, _name, _noting(_name))


@contextmanager
def watch_numbers(places: Iterable[tuple[nn.Module, str]]) -> Iterator[list[str]]:
    """Replace the numbers in these (module, attribute) by watched ones, and yield the list of what code does with them."""
    uses: list[str] = []
    numbers = [(module, name, module.__dict__[name]) for module, name in places]
    for module, name, value in numbers:
        module.__dict__[name] = WatchedNumber(value, uses)
    try:
        yield uses
    finally:
        for module, name, value in numbers:
            module.__dict__[name] = value
