"""A call of a torch function as it was recorded, and what may become of it on a rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from lightning_tp.infer.calls.layouts import OnRanks
from lightning_tp.infer.calls.local_sizes import PerRankInt
from lightning_tp.infer.follow.trace import TensorFacts
from lightning_tp.styles.calls.call import Call, Path


@dataclass(frozen=True)
class Given(OnRanks):
    """A tensor that a call is given. Its layout is None if it is a parameter, but for calls that move data.

    Args:
        path: where it stands among the arguments.
        facts: what is known of it.
        is_split: whether it is a split parameter, of which a rank has its shard already.
        equal_gradient: whether its gradient is equal on all ranks (state I of `spmd_types`); combined with sharded tensors, ranks compute
            partial gradients of it, which have to be all-reduced.
        partial_inside: whether it is a parameter of which, inside this very call, ranks compute partial gradients (a query that is scaled
            first).
    """

    path: Path
    facts: TensorFacts
    is_split: bool
    equal_gradient: bool
    partial_inside: bool


@dataclass(frozen=True)
class RecordedCall:
    """One call of a torch function, with how what goes in and comes out lies on the ranks.

    Args:
        name: of the function.
        func: the function.
        args: as the code gave them; sizes of shards are `PerRankInt`s.
        kwargs: likewise.
        out: what it returned.
        site: the call site.
        module: whose code called it.
        given: the tensors among its arguments.
        results: the tensors that it returned.
        before: id -> what it was, of the tensors given to a call that writes in place.
        products: ("out" | "in" | "apart", parameter) of the weights that it multiplies with, each once; see `FeatureTracer.events`.
        vocabulary: of a product that makes logits: how many.
        partial_results: whether a result is equal on all ranks, with a partial gradient.
        tp: how many ranks.
    """

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    site: tuple[Any, ...]
    module: str
    given: tuple[Given, ...]
    results: tuple[OnRanks, ...]
    before: Mapping[int, OnRanks]
    products: tuple[tuple[str, str], ...]
    vocabulary: int | None
    partial_results: bool
    tp: int

    @cached_property
    def unchanged(self) -> Call:
        """The call as it is."""
        return Call(self.name, self.site)

    @property
    def sums_over_ranks(self) -> bool:
        """Whether it is a product with a row-wise weight, whose results are partial sums."""
        return any(kind == "in" for kind, _ in self.products)

    @property
    def tensors(self) -> tuple[OnRanks, ...]:
        """What goes in and comes out, in order."""
        return *self.given, *self.results

    @property
    def is_involved(self) -> bool:
        """Whether anything sharded goes in or comes out, or a gradient that is equal on all ranks meets partial ones."""
        if any(x.layout is not None for x in self.tensors) or self.sums_over_ranks or self.vocabulary is not None:
            return True
        return self.partial_results and any(g.equal_gradient for g in self.given)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument by its position or its name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


@dataclass(frozen=True)
class Change:
    """What becomes of a recorded call on each rank.

    Args:
        call: what changes in it.
        sizes: those of its arguments that are known for sizes, and right with what changes; code need not read full ones for them.
    """

    call: Call
    sizes: tuple[PerRankInt, ...] = ()


class NotOnShards(Exception):
    """A call can't run on shards, and why.

    Args:
        why: a clause about the call.
        tensors: whose features have to stay together; None: those of its first sharded operand.
        sizes: as of `Change`.
    """

    def __init__(self, why: str, tensors: list[Tensor] | None = None, sizes: tuple[PerRankInt, ...] = ()) -> None:
        super().__init__(why)
        self.tensors, self.sizes = tensors, sizes
