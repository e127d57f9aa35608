"""The state of a tensor on the tensor-parallel axis: what each rank holds of it, and of its gradient.

| state | each rank holds | its gradient is in the state |
|---|---|---|
| `R` (replicated) | the full tensor, equal on all ranks | `P`: each rank computes a term of the sum |
| `I` (invariant) | the full tensor, equal on all ranks | `I`: equal on all ranks |
| `P` (partial) | a term of a sum over the ranks | `R`: equal on all ranks |
| `S(d)` (sharded) | its shard of dim `d` | `S(d)`: the same shard |

Letters and rules are those of spmd_types (github.com/meta-pytorch/spmd_types), on which torchtitan runs. `R` and `I` hold the same values;
they differ in what has to happen to the gradient. Torch's placements do not tell them apart: both are `Replicate()`. A fifth state of
spmd_types, `V` (any value on each rank), does not leave a split module here.

Two shards have a meaning of their own: `S(1)` is the sequence of an activation (B, S, d), `S(-1)` its width, the features of a
column-wise layer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from lightning_tp.errors import TPError


@dataclass(frozen=True)
class State:
    """A state of a tensor on the axis; use `R`, `I`, `P` and `S(dim)`.

    Example:
        >>> S(1), R.gradient, State.of("S(-1)") == S(-1)
        (S(1), P, True)
    """

    letter: Literal["R", "I", "P", "S"]
    dim: int | None = None

    @classmethod
    def of(cls, value: Any) -> State:
        """A state from what a user writes or JSON holds: a `State`, or its name.

        Raises:
            TPError: for anything else; it lists the states.
        """
        if isinstance(value, State):
            return value
        if value in ("R", "I", "P"):
            return cls(value)
        if isinstance(value, str) and (shard := re.fullmatch(r"S\((-?\d+)\)", value)):
            return cls("S", int(shard.group(1)))
        raise TPError(
            f"{value!r} is not a state of a tensor. There are 'R' (full, gradients are summed over ranks), 'I' (full, gradients are equal), "
            "'P' (a partial sum), 'S(1)' (sharded along the sequence) and 'S(-1)' (sharded along the features)."
        )

    @property
    def gradient(self) -> State:
        """The state of the gradient of a tensor in this state."""
        return {"R": P, "P": R}.get(self.letter, self)

    @property
    def is_full(self) -> bool:
        """Whether every rank holds the full tensor: `R` or `I`."""
        return self.letter in "RI"

    def __repr__(self) -> str:
        return self.letter if self.dim is None else f"{self.letter}({self.dim})"


R = State("R")
I = State("I")  # noqa: E741  the letter of spmd_types
P = State("P")


def S(dim: int) -> State:
    """The state in which each rank holds its shard of `dim`."""
    return State("S", dim)


SEQUENCE = S(1)
WIDTH = S(-1)
