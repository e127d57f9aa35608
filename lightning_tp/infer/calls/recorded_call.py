"""A call of a torch function as it was recorded, and what may become of it on a rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.autograd import Function

from lightning_tp.infer.calls.layouts import OnRanks
from lightning_tp.infer.calls.local_sizes import PerRankInt
from lightning_tp.infer.follow.features import gradient_is_partial
from lightning_tp.infer.follow.trace import TensorFacts
from lightning_tp.styles.calls.call import Call, Path


@dataclass(frozen=True)
class Given(OnRanks):
    """A tensor that a call is given. Its layout is None if it is a parameter, but for calls that move data.

    Where one with an equal gradient (state I of `spmd_types`) is combined with sharded tensors, each rank computes a partial gradient of it,
    and these have to be all-reduced.
    """

    path: Path  # where it stands among the arguments
    facts: TensorFacts
    is_split: bool  # a split parameter, of which a rank has its shard already
    equal_gradient: bool  # its gradient is equal on all ranks
    partial_inside: bool  # a parameter of which ranks compute partial gradients inside this very call: a query that is scaled first


@dataclass(frozen=True)
class RecordedCall:
    """One call of a torch function, with how what goes in and comes out lies on the ranks."""

    name: str  # of the function
    func: Callable[..., Any]
    args: tuple[Any, ...]  # as the code gave them; sizes of shards are `PerRankInt`s
    kwargs: dict[str, Any]
    site: tuple[Any, ...]  # the call site
    module: str  # whose code called it
    given: tuple[Given, ...]  # the tensors among its arguments
    results: tuple[OnRanks, ...]  # the tensors that it returned
    before: Mapping[int, OnRanks]  # id -> what it was before, of the tensors given to a call that writes in place
    products: tuple[tuple[str, str], ...]  # with weights, once each; as of `FeatureTracer.events`
    vocabulary: int | None  # of a product that makes logits: how many
    partial_results: bool  # whether a result is equal on all ranks, with a partial gradient
    tp: int
    runs_modules: bool = False  # whether modules run inside: in the forward of an `autograd.Function`

    @cached_property
    def is_function(self) -> bool:
        """Whether it is the `apply` of an `autograd.Function`, of whose backward nothing is known."""
        owner = getattr(self.func, "__self__", None)
        return isinstance(owner, type) and issubclass(owner, Function)

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
        if self.is_function and (self.partial_results or any(gradient_is_partial(g.facts.label) for g in self.given)):
            return True
        return self.partial_results and any(g.equal_gradient for g in self.given)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument by its position or its name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


@dataclass(frozen=True)
class Change:
    """What becomes of a recorded call on each rank."""

    call: Call  # what changes in it
    # of its arguments, known for sizes and right with what changes: code need not read full ones
    sizes: tuple[PerRankInt, ...] = ()


class NotOnShards(Exception):
    """A call can't run on shards, and why."""

    def __init__(self, why: str, tensors: list[Tensor] | None = None, sizes: tuple[PerRankInt, ...] = ()) -> None:
        super().__init__(why)
        self.tensors = tensors  # whose features have to stay together; None: those of its first sharded operand
        self.sizes = sizes  # as of `Change`


def tensors_given(args: Any, kwargs: Any) -> list[tuple[Path, Tensor]]:
    """Return the tensors among the arguments of a call, with where they stand."""
    found: list[tuple[Path, Tensor]] = []
    for key, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, Tensor):
            found.append(((key,), value))
        elif isinstance(value, (tuple, list)):
            found += [((key, i), v) for i, v in enumerate(value) if isinstance(v, Tensor)]
    return found
