"""One traced run of a workload."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tp.infer.blocks.repeated import RepeatedBlocks
from lightning_tp.infer.blocks.workload import Workload


class Stack(nn.Module):
    """Residual MLPs, and a head; it keeps what went through, which is there for the run only."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        mlps = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(depth))
        self.layers, self.head, self.seen = nn.ModuleList(mlps), nn.Linear(4, 6), [0]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = x + layer(x)
        self.seen.append(1)
        return {"logits": self.head(x), "hidden": x}


def workload(depth: int = 5) -> Workload:
    return Workload(Stack(depth), lambda m, x: m(x), torch.zeros(2, 3, 4), 2)


def names(run: Any) -> set[str]:
    return {name for name, _ in run.trace.nodes}


def test_of_identical_blocks_one_is_traced() -> None:
    folded = workload().with_identical_blocks()
    assert folded.blocks.copies == {f"layers.{i}": "layers.0" for i in range(1, 5)}
    run = folded.trace(set(), {})
    assert run.ran == {"layers.0", "layers.1"}  # the first is given what has no gradient, all others what has one
    assert names(run) == {"layers.0.0.weight", "layers.0.2.weight", "layers.1.0.weight", "layers.1.2.weight", "head.weight"}


def test_without_blocks_all_are_traced_but_what_is_whole() -> None:
    run = workload(2).trace({("head.weight", 0)}, {})
    assert names(run) == {f"layers.{i}.{j}.weight" for i in range(2) for j in (0, 2)}
    assert run.ran == frozenset()


def test_outputs_are_the_features_of_what_is_returned_without_those_that_have_none() -> None:
    run = workload(1).trace(set(), {})
    (logits,) = run.outputs
    assert torch.equal(logits[0, 0], run.trace.nodes["head.weight", 0])


def test_shared_features_are_those_of_every_rank() -> None:
    every = torch.tensor([True] * 3 + [False] * 5)
    nodes = workload(1).trace(set(), {("layers.0.0.weight", 0): every}).trace.nodes["layers.0.0.weight", 0]
    assert (nodes == 0).tolist() == every.tolist()


def test_blocks_that_were_given_other_inputs_have_run() -> None:
    one = workload(5)
    blocks = RepeatedBlocks({"layers.4": "layers.0"})
    one = Workload(one.model, lambda m, x: m.layers[4](m.layers[0](x)[:, :2]), one.inputs, 2, blocks)
    assert one.trace(set(), {}).ran == {"layers.0", "layers.4"}


def test_a_run_leaves_the_modules_as_they_were() -> None:
    one = workload()
    hooked: list[nn.Module] = []

    def recorder(tracer: Any) -> Any:
        one.model.head.register_forward_hook(lambda *_: hooked.append(one.model.head))
        return nullcontext()

    one.trace(set(), {}, recorder)
    assert hooked == [one.model.head]
    assert one.model.seen == [0] and not one.model.head._forward_hooks
