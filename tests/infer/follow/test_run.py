from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tp.infer.follow.run import leaves, run
from tests.infer.follow.traced import Net, classes_of, traced


class Head(nn.Module):
    def __init__(self, keyword: bool = False) -> None:
        super().__init__()
        self.head, self.keyword = nn.Linear(4, 16), keyword

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(input=self.head(x), target=y) if self.keyword else F.cross_entropy(self.head(x), y)


@pytest.mark.parametrize("keyword", [False, True])
def test_features_end_at_the_cross_entropy(keyword: bool) -> None:
    trace, loss, tracer = traced(Head(keyword), torch.zeros(2, 4), torch.tensor([1, 2]))
    assert classes_of(trace, ("head.weight", 0)) == [*range(1, 17)]
    (logits,) = trace.logits
    assert torch.equal(logits[0], trace.nodes["head.weight", 0])
    assert tracer.shadow(loss).label is None
    assert loss.item() == pytest.approx(Head()(torch.zeros(2, 4), torch.tensor([1, 2])).item(), rel=0.5)


def test_modules_are_named_while_they_run_and_hooks_are_removed() -> None:
    stacks = []

    class Seen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            stacks.append(list(tracers[0].stack))
            if x.ndim > 2:
                raise ValueError("three dims")
            return x

    tracers: list[Any] = []

    @contextmanager
    def during(tracer: Any) -> Any:
        tracers.append(tracer)
        yield

    net = Net(nn.Sequential(Seen()))
    run(net, lambda m, x: m(x), torch.zeros(2, 4), set(), {}, during=during)
    assert stacks == [["", "", "between", "between.0"]]
    tracers.clear()
    with pytest.raises(ValueError, match="three dims"):
        run(net, lambda m, x: m(x), torch.zeros(1, 2, 4), set(), {}, during=during)
    assert tracers[0].stack == [""]
    net(torch.zeros(2, 4))
    assert tracers[0].stack == [""]  # the hooks are gone


def test_gradients_are_recorded_as_around_and_inputs_go_to_the_device_of_the_model() -> None:
    _, out, _ = run(nn.Linear(4, 4).to("meta"), lambda m, x: m(x), torch.zeros(2, 4, requires_grad=True), set(), {})
    assert out.is_meta and out.requires_grad
    with torch.no_grad():
        _, out, _ = run(nn.Linear(4, 4), lambda m, x: m(x), torch.zeros(2, 4), set(), {})
    assert not out.requires_grad


def test_leaves_are_found_in_lists_dicts_and_dataclasses() -> None:
    @dataclass
    class Out:
        a: Tensor
        b: Any

    x = torch.zeros(1)
    assert len(leaves(Out(x, [{"c": x}, (x, None)]))) == 3
    assert leaves(object()) == []
