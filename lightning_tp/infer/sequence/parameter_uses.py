"""Follow parameters to where they are used, also through tensors that are computed from parameters alone: 1 + weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_tp.infer.follow.tracer import FeatureTracer
from lightning_tp.infer.sequence.partial_sums import tensors_of


class ComputedParameters:
    """Tensors that are computed from parameters alone, and what they meet: pairs of a parameter and the module whose code it is."""

    def __init__(self, tracer: FeatureTracer) -> None:
        self.tracer = tracer
        self.computed_in: set[tuple[str, str]] = set()  # where such a tensor is computed
        self.on_shards: set[tuple[str, str]] = set()  # where one meets the sequence shard
        self.on_full: set[tuple[str, str]] = set()  # where one meets full activations that have a gradient
        self._parameters: dict[int, tuple[Tensor, set[str]]] = {}  # that a tensor is computed from

    def __contains__(self, t: Tensor) -> bool:
        return id(t) in self._parameters

    def follow(self, given: list[Tensor], out: Any, module: str) -> None:
        """Note what a call makes of parameters, and of such tensors, in the code of a module."""
        names = [self._names_of(t) for t in given]
        if not any(names):
            return
        facts = [self.tracer.shadow(t) for t in given]
        computed = {(n, module) for t, of in zip(given, names, strict=True) if t in self for n in of}
        if any(f.label is not None for f in facts):
            self.on_shards |= computed
        elif any(f.grad and not of for f, of in zip(facts, names, strict=True)):
            self.on_full |= computed
        else:
            every = set.union(*names)
            self.computed_in |= {(n, module) for n in every}
            made = [(t, self.tracer.shadow(t)) for t in tensors_of(out)]
            self._parameters.update({id(t): (t, every) for t, f in made if f.grad and f.param is None})

    def _names_of(self, t: Tensor) -> set[str]:
        param = self.tracer.shadow(t).param
        return {param[0]} if param is not None else self._parameters[id(t)][1] if t in self else set()
