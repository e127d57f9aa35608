"""Run small models under the tracer. No tests here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_tp.infer.follow.run import run
from lightning_tp.infer.follow.trace import FeatureTrace
from lightning_tp.infer.follow.tracer import FeatureTracer


class Net(nn.Module):
    """Two linear layers, and something between them."""

    def __init__(self, between: Any, width: int = 8) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(4, width), nn.Linear(width, 4), between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


def traced(
    model: nn.Module, *inputs: Any, whole: Any = (), shared: Any = None, **options: Any
) -> tuple[FeatureTrace, Any, FeatureTracer]:
    """`options`: attributes of the tracer, set before the run."""

    def tracer_of(*args: Any) -> FeatureTracer:
        tracer = FeatureTracer(*args)
        for name, value in options.items():
            setattr(tracer, name, value)
        return tracer

    return run(model, lambda m, x: m(*x), inputs, set(whole), shared or {}, tracer_of=tracer_of)


def numbered(labels: Tensor) -> Any:
    """Representatives in the order in which they come, 0 where there is no feature."""
    order = {0: 0}
    return torch.tensor([order.setdefault(n, len(order)) for n in labels.flatten().tolist()]).view(labels.shape).tolist()


def classes_of(trace: FeatureTrace, key: tuple[str, int]) -> list[int]:
    """The sets of a weight's features, numbered in the order in which they come."""
    found: list[int] = numbered(trace.classes.find(trace.nodes[key]))
    return found


def labels_of(trace: FeatureTrace, tracer: FeatureTracer, t: Tensor) -> Any:
    """The sets of the features of a tensor's elements, numbered in the order in which they come."""
    return numbered(trace.classes.find(tracer.label(t)))
