"""What following one run of a model finds: facts about each tensor, uses of each weight, sets of features."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from lightning_tp.infer.follow.features import FeatureSets


class ParamView(NamedTuple):
    """A tensor that is a view of a parameter.

    Args:
        name: of the parameter.
        coordinates: for each dim of the parameter, where in it each element of the view lies.
    """

    name: str
    coordinates: tuple[Tensor, ...]


@dataclass
class TensorFacts:
    """What is known of a tensor.

    Args:
        label: the feature that each element was computed from, 0 where every rank has it; None: 0 everywhere, and an equal gradient.
        param: the parameter that it is a view of.
        grad: whether a gradient flows back through it.
    """

    label: Tensor | None = None
    param: ParamView | None = None
    grad: bool = False


@dataclass(frozen=True)
class Use:
    """A product of an activation with a weight.

    Args:
        name: of the parameter.
        dim: of the parameter, along which it is split.
        kind: "out": it makes features (column-wise); "in": it sums over features (row-wise); "along": it has features of its own for each
            group of those that it reads.
        module: whose forward ran.
    """

    name: str
    dim: int
    kind: str
    module: str


@dataclass
class FeatureTrace:
    """What one run showed.

    Args:
        classes: the features, in sets that have to lie on one rank.
        nodes: (parameter, dim) -> its features.
        uses: products of activations with weights, in order.
        pieces: (parameter, dim) -> indices that occur in one product: the experts in a stack.
        local_uses: parameter -> modules where it is combined with sharded activations.
        whole_uses: parameter -> modules where it is combined with activations that are equal on all ranks.
        looked_up: parameter -> modules that take rows of it.
        convolved: weights of convolutions: their features lie along dim 1 of the output.
        operands: the features of each factor of a product of activations.
        logits: labels of the input of the loss.
        tried: calls that were found to give the same on shards, in runs that number features as this one.
        leaked_partial: modules where a tensor with a partial gradient is combined with one whose gradient is equal on all ranks.
    """

    classes: FeatureSets
    nodes: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    uses: dict[Use, None] = field(default_factory=dict)
    pieces: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    local_uses: dict[str, set[str]] = field(default_factory=dict)
    whole_uses: dict[str, set[str]] = field(default_factory=dict)
    looked_up: dict[str, set[str]] = field(default_factory=dict)
    convolved: set[str] = field(default_factory=set)
    operands: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    tried: set[Any] = field(default_factory=set)
    leaked_partial: dict[str, None] = field(default_factory=dict)
