"""What following one run of a model finds: facts about each tensor, uses of each weight, sets of features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from lightning_tp.infer.follow.features import FeatureSets


class ParamView(NamedTuple):
    """A tensor that is a view of a parameter."""

    name: str  # of the parameter
    coordinates: tuple[Tensor, ...]  # for each dim of the parameter, where in it each element of the view lies


@dataclass
class TensorFacts:
    """What is known of a tensor."""

    # of each element the feature it was computed from, 0: every rank has it; None: with an equal gradient
    label: Tensor | None = None
    param: ParamView | None = None  # the parameter that it is a view of
    grad: bool = False  # whether a gradient flows back through it

    def moved(self, move: Callable[[Tensor], Tensor]) -> TensorFacts:
        """Return the facts of the tensor after a data movement, which is applied to labels and coordinates."""
        param = None if self.param is None else ParamView(self.param.name, tuple(map(move, self.param.coordinates)))
        return TensorFacts(None if self.label is None else move(self.label), param, self.grad)

    def batched(self) -> TensorFacts:
        """Return the facts of the tensor as a batch of one."""
        return self.moved(lambda t: t.unsqueeze(0))


@dataclass(frozen=True)
class Use:
    """A product of an activation with a weight."""

    name: str  # of the parameter
    dim: int  # of the parameter, along which it is split
    # "out": it makes features (column-wise); "in": it sums over features (row-wise); "along": it has its own for each group of those it reads
    kind: str
    module: str  # whose forward ran


@dataclass
class FeatureTrace:
    """What one run showed."""

    classes: FeatureSets  # the features, in sets that have to lie on one rank
    nodes: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # (parameter, dim) -> its features
    uses: dict[Use, None] = field(default_factory=dict)  # in order
    pieces: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)  # -> indices in one product: experts in a stack
    # parameter -> modules where it is combined with sharded activations
    local_uses: dict[str, set[str]] = field(default_factory=dict)
    whole_uses: dict[str, set[str]] = field(default_factory=dict)  # and with activations that are equal on all ranks
    looked_up: dict[str, set[str]] = field(default_factory=dict)  # parameter -> modules that take rows of it
    convolved: set[str] = field(default_factory=set)  # weights of convolutions: their features lie along dim 1 of the output
    operands: list[Tensor] = field(default_factory=list)  # the features of each factor of a product of activations
    logits: list[Tensor] = field(default_factory=list)  # labels of what the loss was given
    tried: set[Any] = field(default_factory=set)  # calls that give the same on shards, in runs that number features as this one
    # modules where a tensor with a partial gradient is combined with one whose gradient is equal on all ranks
    leaked_partial: dict[str, None] = field(default_factory=dict)
