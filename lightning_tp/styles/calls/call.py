"""One call in a module's code that has to change on a rank, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_tp.core.comm.state import I, State
from lightning_tp.styles.base import as_tuples
from lightning_tp.styles.split import Ownership

SIZE_CALLS = frozenset({"view", "reshape", "expand", "unflatten", "broadcast_to", "repeat"})  # are given sizes of their result
SPLIT_CALLS = frozenset({"split", "chunk", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split"})
FACTORIES = frozenset({"zeros", "ones", "empty", "full", "rand", "randn", "new_zeros", "new_ones", "new_empty", "new_full"})
# where sizes begin among the arguments; else at 1: behind the tensor
FIRST_SIZE = {"unflatten": 2, "zeros": 0, "ones": 0, "empty": 0, "full": 0, "rand": 0, "randn": 0}
CONVOLUTIONS = frozenset(f"conv{way}{n}d" for way in ("", "_transpose") for n in (1, 2, 3))
COUNTS = frozenset({"numel", "nelement", "__len__"})
READS = frozenset({"__get__", "size"}) | COUNTS  # read sizes; "__get__" is `.shape`

Path = tuple[int | str, ...]  # where an argument stands: a position, or a name, then a position inside a list


@dataclass(frozen=True)
class Operand:
    """What becomes of one tensor that a call is given."""

    path: Path  # where it stands
    part: tuple[int, Ownership] | None = None  # (dim counted from the last, ownership): a rank needs its part of that dim
    enter: bool = False  # ranks compute partial gradients of it, which are all-reduced (I -> R: the identity, backward all-reduce)
    beside: Path | None = None  # a split operand of the same call; where this one has the size of its shard already, it is not cut
    # ranks have partial gradients of it, but inside of the call equal ones (R -> I). Then so have results, and outside partial ones
    leave: bool = False
    full: tuple[int, ...] | None = (
        None  # a split parameter of this full shape, which code reads beside products: it is given all of it
    )


@dataclass(frozen=True)
class Call:
    """What becomes of one call."""

    name: str  # of the torch function
    at: tuple[Any, ...]  # the call site; see `core.modules.call_site`
    operands: tuple[Operand, ...] = ()  # tensors that are changed before it
    # for each rank, (position among the sizes, numerator, denominator): a given size is multiplied; denominator 0 sets it, -1 makes
    # it the length of the sequence that is sharded
    sizes: tuple[tuple[tuple[int, int, int], ...], ...] = ()
    pieces: tuple[tuple[int, ...], ...] = ()  # for each rank, the sizes that a split makes
    # for each rank, the (position, start, stop, step) of a slice in an index, and the length of the dim that it is taken of
    items: tuple[tuple[int, ...], ...] = ()
    leave: bool = False  # its result is a partial sum, which is reduced over the ranks; a bias among its arguments is added once
    logits: int | None = None  # its result stays split for the loss: the length of the vocabulary
    groups: tuple[int, ...] = ()  # for each rank, how many groups of channels a convolution has
    to: State = I  # with `leave`, what partial sums become: `I`, `S(1)` (this rank's tokens), or `P` (partial sums, as they are)

    @property
    def changes(self) -> bool:
        """Whether anything changes; if not, it counts the turns of a call site that changes at other times."""
        return bool(self.operands or self.sizes or self.pieces or self.items or self.leave or self.logits or self.groups)


def call_from(plain: dict[str, Any]) -> Call:
    """Return a call from plain data, as `RewrittenCalls.options` gives it and JSON keeps it."""
    plain = as_tuples(plain)
    operands = tuple(Operand(**{**o, "part": o["part"] and (o["part"][0], Ownership(**o["part"][1]))}) for o in plain["operands"])
    return Call(**{**plain, "operands": operands, "to": State.of(plain["to"])})
