"""Run a model once and find which elements of each activation come from which features of which weight.

A label tensor goes along with each activation that the output features of a linear layer have reached (see `features.py`). For each aten operator
there is a rule, a function `(tracer, op) -> facts of its results`, registered by name with `follows`: `moves.py` has those that move or reduce
data, `products.py` those that multiply with weights, `convolutions.py` convolutions. Names of modules do not matter, only what the
forward computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lightning_tp._compat import base_of, is_in_place, without_dispatch_modes
from lightning_tp.core.trees import tensors_in
from lightning_tp.infer.follow.features import gradient_is_partial, no_features, shrunk
from lightning_tp.infer.follow.meta import Values
from lightning_tp.infer.follow.trace import TensorFacts, Use

MOST_WRITTEN = 2**12  # elements of a literal in the code up to which it is compared between runs


@dataclass(frozen=True)
class AtenCall:
    """One operation of a run."""

    func: Any
    args: Any
    kwargs: Any
    out: Any
    tensors: list[Tensor]  # those among the arguments, in order
    facts: list[TensorFacts]  # what is known of each of these

    @property
    def name(self) -> str:
        """The operator without its overload."""
        return _name_of(self.func)

    @cached_property
    def outs(self) -> list[Tensor]:
        """The tensors that it returned."""
        return list(tensors_in(self.out, depth=0))

    @cached_property
    def grad(self) -> bool:
        """Whether a gradient flows back through it."""
        return any(f.grad for f in self.facts)

    def labelled(self, label: Tensor | None) -> list[TensorFacts]:
        """Return the facts of results that all have this label, expanded to their shapes."""
        return [TensorFacts(None if label is None else label.expand(t.shape), None, self.grad) for t in self.outs]


Rule = Callable[["FeatureTracer", AtenCall], list[TensorFacts]]
RULES: dict[str, Rule] = {}
ANY_OTHER = "any other operator"
WRITE_INTO_VIEW = "a write into a view"  # gives the facts of the tensor that it is a view of


def follows(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of the aten operators of these names."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


class FeatureTracer(Values):
    """Follow features through the operations of one forward.

    Args:
        model: whose parameters are the weights.
        whole: (parameter, dim) that make no features: an earlier run found that they are needed whole.
        shared: (parameter, dim) -> mask of the indices whose features every rank has.

    A caller may set the other attributes before the run.
    """

    def __init__(self, model: nn.Module, whole: set[tuple[str, int]], shared: dict[tuple[str, int], Tensor]) -> None:
        super().__init__(model)
        self.whole, self.shared = whole, shared
        self.shapes = {n: p.shape for n, p in model.named_parameters()}
        self.known: set[tuple[str, int, str]] = set()  # (parameter, dim, kind) of the uses that an earlier run found
        self.owner: Tensor | None = None  # the rank of each feature, -1 for all ranks
        self.gathered = False  # whether a split weight may read an activation whose gradient is partial
        self.deferring = False  # whether sums over ranks stay partial sums where they are made
        # each operation, to compare runs: (module, operator, other arguments, shapes of the results)
        self.log: list[tuple[Any, ...]] | None = None
        # ("out" | "in" | "apart", parameter) of the torch function that runs now; "apart": several products that are not split alike
        self.events: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = self.compute(func, args, kwargs)
        if self.log is not None:
            self.log.append(self._entry(func, args, kwargs, out))
        tensors = list(tensors_in((args, kwargs), depth=0))
        facts = [self.shadow(t) for t in tensors]
        if any(f.label is not None or f.param is not None or f.grad for f in facts):
            self.trace.classes.why = f"`{_name_of(func).strip('_')}` in `{self.stack[-1] or 'the model'}`"
            with without_dispatch_modes():
                op = AtenCall(func, args, kwargs, out, tensors, facts)
                for t, found in zip(op.outs, RULES.get(op.name, RULES[ANY_OTHER])(self, op), strict=False):
                    self.put(t, found)
                    if is_in_place(func) and (base := base_of(t)) is not None:
                        self.put(base, RULES[WRITE_INTO_VIEW](self, op)[0])
        return out

    def _entry(self, func: Any, args: Any, kwargs: Any, out: Any) -> tuple[Any, ...]:
        leaves = [x for x in tree_flatten((args, kwargs))[0] if not isinstance(x, Tensor)]
        rest = tuple(x if isinstance(x, (int, float, str, type(None))) else str(x) for x in leaves)
        made: tuple[Any, ...] = tuple(tuple(t.shape) for t in tensors_in(out, depth=0))
        if func is torch.ops.aten.lift_fresh.default and not out.is_meta and out.numel() <= MOST_WRITTEN:  # a literal in the code
            with without_dispatch_modes():
                made = (*made, str(out.tolist()))
        return self.stack[-1], func, rest, made

    def label(self, t: Tensor) -> Tensor:
        """Return the labels of a tensor, zeros for none; without memory for constant dims."""
        label = self.shadow(t).label
        return no_features(*t.shape) if label is None else label

    def index(self, t: Tensor) -> Tensor:
        """Return the values of an index; zeros where they are not known (a router's choice, on the meta device)."""
        value = self.value(t)
        return torch.zeros(t.shape, dtype=t.dtype) if value is None else value.cpu()

    def features(self, name: str, dim: int) -> Tensor:
        """Return the features of a weight along one dim; made at its first use."""
        key = name, dim
        if key not in self.trace.nodes:
            new = self.trace.classes.new(self.shapes[name][dim])
            self.trace.nodes[key] = new.masked_fill(self.shared[key], 0) if key in self.shared else new
        return self.trace.nodes[key]

    def note_product(self, name: str, dim: int, kind: str) -> None:
        """Note what a weight does to features along this dim; see `Use.kind`."""
        self.trace.uses[Use(name, dim, kind, self.stack[-1])] = None

    def note_operands(self, params: Iterable[str], labels: list[Tensor]) -> None:
        """Note that parameters are combined with activations of these labels: with sharded ones, or with ones that are equal everywhere."""
        owner = self.owner
        if owner is not None:  # logits show their full shape: ranks neither have different elements of them, nor partial gradients
            labels = [x for x in labels if gradient_is_partial(x) or bool((owner[shrunk(x)] >= 0).any())]
        uses = self.trace.local_uses if labels else self.trace.whole_uses
        for name in params:
            uses.setdefault(name, set()).add(self.stack[-1])

    def note_leaked_partial(self, op: AtenCall) -> None:
        """Note where a tensor with a partial gradient is combined with one whose gradient is equal on all ranks: neither would be right."""
        labels = [f.label for f in op.facts if f.label is not None and f.label.numel()]
        if not labels or len(labels) == len(op.tensors) or not all(map(gradient_is_partial, labels)):
            return
        if any(f.label is None and f.param is None and f.grad for f in op.facts):
            self.trace.leaked_partial[self.stack[-1]] = None


@lru_cache(maxsize=4096)
def _name_of(func: Any) -> str:
    """Return the name of an operator without its overload; the same one for all kernels of attention."""
    name: str = func.overloadpacket.__name__
    return "scaled_dot_product_attention" if name.startswith("_scaled_dot_product") else name
