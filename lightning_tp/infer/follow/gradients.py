"""Gradients that code takes while its features are followed: computed apart, and ones where the graph has a gap."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tp._compat import backward_by, unobserved
from lightning_tp.infer.follow.meta import Values
from lightning_tp.infer.follow.trace import TensorFacts

# what is called about gradients: nothing in it is on shards
ABOUT_GRADIENTS = frozenset({torch.autograd.grad, Tensor.backward, Tensor.register_hook, Tensor.requires_grad_, Tensor.retain_grad})


@contextmanager
def gradients_apart(model: nn.Module, tracer: Values | None = None) -> Iterator[None]:
    """Compute gradients that code takes (`backward`, `torch.autograd.grad`) without the modes that are on; `grad` of parameters is restored.

    Blocks that are skipped, shards without their peers and tensors on the meta device leave gaps in the graph: a gradient that can't be
    computed for them is one, everywhere. Only its shape and where it comes from matter.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [(p, p.grad) for p in parameters]

    def run(
        own: Any,
        outputs: Any,
        grads: Any,
        keep: Any,
        create: Any,
        inputs: Any,
        *options: Any,
        accumulate_grad: bool = False,
        **_: Any,
    ) -> Any:
        with unobserved():
            try:
                found = own(outputs, grads, keep, create, inputs, True, accumulate_grad=accumulate_grad)
            except Exception:
                found = (None,) * len(inputs)
            if accumulate_grad:
                for p in [t for t in inputs if isinstance(t, Tensor) and t.is_leaf] or parameters:
                    p.grad = torch.ones_like(p) if p.grad is None else p.grad
                return found
            may_be_none = bool(options and options[0])
            made = [
                _ones(t, create) if g is None and not may_be_none and isinstance(t, Tensor) else g
                for g, t in zip(found, inputs, strict=True)
            ]
        for g, t in zip(made, inputs, strict=True):
            facts = tracer.shadow(t) if tracer is not None else TensorFacts()
            if tracer is not None and g is not None and facts.param is None and facts.label is not None:
                tracer.put(g, TensorFacts(facts.label, None, g.requires_grad))
        return tuple(made)

    with backward_by(run):
        try:
            yield
        finally:
            for p, grad in before:
                p.grad = grad


def _ones(t: Tensor, create: bool) -> Tensor:
    return torch.ones_like(t.detach()).requires_grad_(bool(create)) * 1
