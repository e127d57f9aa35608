"""Regions of the residual stream that may be sharded along the sequence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_tp.styles.calls.call import Call

Arg = int | str


LEAST_BLOCKS = 2  # that follow each other: at the ends of a stream it is gathered once more


STEPS = ("sum", "sums", "return", "open")  # what is tried for a region, in this order


# on terms of a sum over ranks: what moves them, what is linear in them, what begins as zeros
MOVES = {
    *(
        "view",
        "reshape",
        "transpose",
        "permute",
        "contiguous",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "to",
        "type",
        "float",
    ),
    *(
        "half",
        "bfloat16",
        "type_as",
        "clone",
        "expand",
        "chunk",
        "split",
        "__getitem__",
        "index_select",
        "unbind",
        "narrow",
        "view_as",
    ),
    *("__get__", "sum", "mean", "movedim", "swapaxes", "reshape_as", "identity"),
}


SUMS = {"add", "__add__", "__radd__", "add_", "__iadd__", "sub", "__sub__", "sub_", "__isub__", "cat", "stack"}


INTO = {"index_add", "index_add_", "scatter_add", "scatter_add_", "__setitem__", "index_put_", "copy_"}


FACTORS = {"mul", "__mul__", "__rmul__", "mul_", "__imul__", "einsum", "matmul", "bmm", "__matmul__"}


ZEROS = {"zeros", "zeros_like", "new_zeros"}


class NotSequenceParallel(Exception):
    """The stream stays whole, and why; and the modules whose code it is, or what could be had otherwise."""

    def __init__(self, why: str, modules: set[str] | None = None, otherwise: _Choices | None = None) -> None:
        super().__init__(why)
        self.modules, self.otherwise = modules or set(), otherwise or _Choices()


@dataclass
class _Choices:
    """What is had in another way than the most usual one.

    Args:
        steps: name of a region, numbers as stars -> how far it has come in STEPS.
        kept: (region, argument) that is taken in shards: a residual that is added inside.
        reads: places where the code reads the length of the sequence for what is whole.
    """

    steps: dict[str, int] = field(default_factory=dict)
    kept: set[tuple[str, Arg]] = field(default_factory=set)
    reads: set[Any] = field(default_factory=set)


@dataclass
class _Region:
    """A module that is entered with the whole stream.

    Args:
        name: of the module.
        how: where the ranks' terms are added up: "sum", where they are made ("sums": also those of another width than the stream), or
            "return", when the module returns.
        args: by which the stream arrives; None if it never ran.
        summed: whether its terms are added up; None if it makes none.
        inner: whether some are whole inside: of another shape than the stream; and whether only the width differs.
    """

    name: str
    how: str
    args: dict[Arg, None] | None = None
    summed: bool | None = None
    inner: bool = False
    wider: bool = False


@dataclass
class SequencePlan:
    """A stream that can be in shards."""

    blocks: list[str]
    entry: Arg | None
    regions: dict[str, _Region]
    sums: set[str]  # row-wise layers, and (module, function, place) of calls, that are summed where they stand
    terms: set[str]  # those whose terms are summed when their region returns
    call_sums: dict[tuple[str, str, Any], str | None]  # and the bias that is added to the sum
    on_tokens: dict[str, set[str]]  # parameter -> modules where it meets tokens
    on_whole: dict[str, set[str]]  # parameter -> modules where it meets something else
    reads: dict[str, list[Call]]  # module -> where its code reads sizes, of which some are to be whole
