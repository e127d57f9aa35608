"""Follow partial sums through the calls of a module: tensors of which each rank has one term, before these are added up.

What is linear in its operands may run on the terms. `LINEAR` says of each torch function when it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_tp.core.trees import tensors_in


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors in tuples, lists and dicts."""
    return list(tensors_in(tree, depth=0))


@dataclass(frozen=True)
class PartialCall:
    """A call of a torch function on partial sums."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    operands: Sequence[Tensor]  # all tensors that it is given
    partial: Sequence[Tensor]  # those that are partial sums
    others: Sequence[Tensor]  # those that are neither partial sums nor zeros


def _always(call: PartialCall) -> bool:
    """Moves elements, or sums some of them."""
    return True


def _of_partial_sums(call: PartialCall) -> bool:
    """A sum: of nothing but partial sums and zeros."""
    return not call.others and not any(isinstance(a, (int, float)) and a for a in call.args)


def _at_indices(call: PartialCall) -> bool:
    """Adds or writes elements at indices: into what is no other tensor."""
    return not any(t.is_floating_point() for t in call.others) and call.kwargs.keys() <= {"dim", "index", "source"}


def _one_factor(call: PartialCall) -> bool:
    """A product: one of its factors may be a partial sum."""
    return len(call.partial) == 1


def _dividend(call: PartialCall) -> bool:
    """A quotient: what is divided may be a partial sum."""
    return len(call.partial) == 1 and call.operands[0] is call.partial[0]


def _drops_nothing(call: PartialCall) -> bool:
    """A dropout: with p=0."""
    return bool(call.kwargs.get("p", call.args[1] if len(call.args) > 1 else 0.5) == 0)


MOVES = frozenset({
    "view", "reshape", "transpose", "permute", "contiguous", "flatten", "unflatten", "squeeze", "unsqueeze", "to", "type", "float", "half",
    "bfloat16", "type_as", "clone", "expand", "chunk", "split", "__getitem__", "index_select", "unbind", "narrow", "view_as", "__get__", "sum",
    "mean", "movedim", "swapaxes", "reshape_as", "identity",
})  # fmt: skip
WRITES = frozenset({"index_add", "index_add_", "scatter_add", "scatter_add_", "__setitem__", "index_put_", "copy_"})
ZEROS = frozenset({"zeros", "zeros_like", "new_zeros"})
LINEAR: dict[str, Callable[[PartialCall], bool]] = {
    **dict.fromkeys(MOVES, _always),
    **dict.fromkeys(
        ("add", "__add__", "__radd__", "add_", "__iadd__", "sub", "__sub__", "sub_", "__isub__", "cat", "stack"), _of_partial_sums
    ),
    **dict.fromkeys(WRITES, _at_indices),
    **dict.fromkeys(("mul", "__mul__", "__rmul__", "mul_", "__imul__", "einsum", "matmul", "bmm", "__matmul__"), _one_factor),
    **dict.fromkeys(("div", "__truediv__"), _dividend),
    "dropout": _drops_nothing,
}


class PartialSums:
    """The partial sums of a run, and the zeros that such are added to."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._zeros: dict[int, Tensor] = {}

    def __contains__(self, t: Any) -> bool:
        return id(t) in self._sums

    def add(self, *tensors: Tensor) -> None:
        """Note that these are partial sums."""
        self._sums.update({id(t): t for t in tensors})

    def remove(self, t: Tensor) -> None:
        """Note that this one is reduced."""
        del self._sums[id(t)]

    def follow(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> bool:
        """Note what comes out of a call.

        Returns:
            False if it is given a partial sum, and does not run on one.
        """
        given, outs = tensors_of((args, kwargs)), tensors_of(out)
        partial = [t for t in given if t in self]
        if name in ZEROS or (not partial and name in MOVES and given and id(given[0]) in self._zeros):
            self._zeros.update({id(t): t for t in outs})
        if not partial:
            return True
        others = [t for t in given if t not in self and id(t) not in self._zeros]
        floating = [t for t in outs if t.is_floating_point()]
        if name not in LINEAR or not LINEAR[name](PartialCall(args, kwargs, given, partial, others)):
            return not floating
        self.add(*floating)
        if name in WRITES or name.endswith("_"):  # into its first operand
            self.add(given[0])
        return True
