"""How each tensor of a run lies on the ranks, by the owner of each feature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_tp.infer.follow.features import shrunk
from lightning_tp.infer.follow.trace import TensorFacts
from lightning_tp.infer.follow.tracer import FeatureTracer
from lightning_tp.styles.split import Ownership


class Sharded(NamedTuple):
    """A tensor that is sharded along one dim."""

    dim: int
    ownership: Ownership  # which rank has which index of it


Layout = Sharded | str | None  # None: every rank has all of it; a string: it lies otherwise, and how


@dataclass(frozen=True)
class OnRanks:
    """A tensor, and how it lies on the ranks."""

    tensor: Tensor
    layout: Layout

    def sizes(self, tp: int) -> list[tuple[int, ...]]:
        """Return for each dim the size on each of tp ranks."""
        sizes = [(n,) * tp for n in self.tensor.shape]
        if isinstance(self.layout, Sharded):
            dim, ownership = self.layout
            sizes[dim] = tuple(ownership.local(self.tensor.shape[dim], r) for r in range(tp))
        return sizes

    def shard(self, rank: int) -> Tensor:
        """Return what a rank has of it."""
        t, layout = self.tensor, self.layout
        return t.index_select(layout.dim, layout.ownership.index(rank, t.shape[layout.dim])) if isinstance(layout, Sharded) else t


class Layouts:
    """The layouts of the tensors of a run.

    Args:
        tracer: of the run.
        owner: the rank of each feature, -1 for 0 (all ranks); from an earlier run that numbered features alike.
        tp: how many ranks.
        nodes: (parameter, dim) -> features, of all parameters that are split.
    """

    def __init__(self, tracer: FeatureTracer, owner: Tensor, tp: int, nodes: dict[tuple[str, int], Tensor]) -> None:
        self.tracer, self.owner, self.tp, self.nodes = tracer, owner, tp, nodes
        self.param_owner = owner  # of the features of parameters; those of logits have an owner, and logits show as whole
        self.weight_of: Mapping[str, str] = {}  # parameters that are split -> the weight that has their features
        self.biases: dict[str, Tensor] = {}  # of split layers: parameter -> features of the layer's output
        self._split = {name for name, _ in nodes}
        self._known: dict[int, tuple[Tensor, Tensor | None, Layout]] = {}  # id of a tensor -> it, its label then, its layout

    def is_split(self, facts: TensorFacts) -> bool:
        """Return whether this is a view of a parameter that is split."""
        return facts.param is not None and facts.param.name in self._split

    def is_followed(self, t: Tensor) -> bool:
        """Return whether a tensor has a layout, or may have one: it was computed from features, or is a split parameter."""
        facts = self.tracer.shadow(t)
        return facts.label is not None or self.is_split(facts)

    def may_be_local(self, t: Tensor) -> bool:
        """Return whether sizes of a tensor may differ on a rank."""
        param = self.tracer.shadow(t).param
        return self.is_followed(t) or (param is not None and param.name in self.biases)

    def features(self, t: Tensor) -> Tensor:
        """Return the labels of a tensor, or the features of the split parameter that it is a view of."""
        param = self.tracer.shadow(t).param
        found = [] if param is None else self.features_of(self.weight_of.get(param.name, param.name))
        return torch.cat(found) if found else self.tracer.label(t)

    def features_of(self, parameter: str) -> list[Tensor]:
        """Return the features of a parameter, along each dim that is split."""
        return [nodes for (name, _), nodes in self.nodes.items() if name == parameter]

    def of(self, t: Tensor) -> Layout:
        """Return how a tensor lies on the ranks."""
        label = self.tracer.shadow(t).label
        known = self._known.get(id(t))
        if known is None or known[0] is not t or known[1] is not label:
            known = self._known[id(t)] = (t, label, self._layout(t))
        return known[2]

    def sizes(self, t: Tensor) -> list[tuple[int, ...]]:
        """Return for each dim of a tensor the size on each rank."""
        param = self.tracer.shadow(t).param
        bias = None if param is None else self.biases.get(param.name)
        layout = self.of(t) if bias is None or t.shape != bias.shape else Sharded(0, Ownership.of(self.param_owner[bias]))
        return OnRanks(t, layout).sizes(self.tp)

    def _layout(self, t: Tensor) -> Layout:
        ranks = self._ranks(t)
        if ranks is None or not bool((ranks >= 0).any()):
            return None
        split = [d for d in range(ranks.ndim) if ranks.shape[d] > 1 and _differ_along(ranks, d, self.tp)]
        if len(split) != 1:
            return f"split along {len(split)} dims"
        dim = split[0]
        return Sharded(dim, Ownership.of(ranks.movedim(dim, 0).reshape(ranks.shape[dim], -1).amax(1)))

    def _ranks(self, t: Tensor) -> Tensor | None:
        """Return the rank of each element, -1 for all ranks; constant dims have length 1."""
        facts = self.tracer.shadow(t)
        if facts.param is None:
            return None if facts.label is None else self.owner[shrunk(facts.label)]
        for (name, dim), nodes in self.nodes.items():
            if name == facts.param.name:
                return self.param_owner[nodes[shrunk(facts.param.coordinates[dim])]]
        return None


def _differ_along(ranks: Tensor, dim: int, tp: int) -> bool:
    """Return whether elements along a dim have different ranks; one that all ranks have goes with those beside it."""
    lowest = ranks.masked_fill(ranks < 0, tp).amin(dim)
    return bool((ranks.amax(dim) != lowest.masked_fill(lowest == tp, -1)).any())
