"""One call in a module's code that has to change on a rank, as plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lightning_tp.core.comm.state import I, State
from lightning_tp.styles.split import Ownership

SIZE_CALLS = frozenset({"view", "reshape", "expand", "unflatten", "broadcast_to", "repeat"})


WITH_BIAS: dict[str, Callable[..., Any]] = {"addmm": torch.mm, "baddbmm": torch.bmm, "addmv": torch.mv}


CONVOLUTIONS = frozenset(f"conv{way}{n}d" for way in ("", "_transpose") for n in (1, 2, 3))


COUNTS = frozenset({"numel", "nelement", "__len__"})


READS = frozenset({"__get__", "size"}) | COUNTS


FACTORIES = frozenset({"zeros", "ones", "empty", "full", "rand", "randn", "new_zeros", "new_ones", "new_empty", "new_full"})


FIRST_SIZE = {"unflatten": 2, "zeros": 0, "ones": 0, "empty": 0, "full": 0, "rand": 0, "randn": 0}  # else 1: behind the tensor


SPLIT_CALLS = frozenset({"split", "chunk", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split"})


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
    part: tuple[int, Ownership] | None = None
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
        to: with `leave`, what the terms become: `I`, `S(1)` (this rank's tokens), or `P` (terms, as they are).
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
    to: State = I

    @property
    def changes(self) -> bool:
        """Whether anything becomes of it: else it only holds its turn at a place in the code."""
        return bool(self.operands or self.sizes or self.pieces or self.items or self.leave or self.logits or self.groups)


def _call_of(plain: dict[str, Any]) -> Call:
    """A call from plain data, as `LocalOps.options` gives it and JSON keeps it."""
    operands = tuple(
        Operand(
            _tuples(o["path"]),
            None if o["part"] is None else (o["part"][0], Ownership(_tuples(o["part"][1]["runs"]))),
            o["enter"],
            None if o["beside"] is None else _tuples(o["beside"]),
        )
        for o in plain["operands"]
    )
    rest = {k: _tuples(v) for k, v in plain.items() if k not in ("operands", "name", "to")}
    return Call(plain["name"], operands=operands, to=State.of(plain["to"]), **rest)


def _tuples(x: Any) -> Any:
    return tuple(_tuples(i) for i in x) if isinstance(x, (list, tuple)) else x
