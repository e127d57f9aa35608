"""One traced run of a workload."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_tp.infer.blocks.repeated import RepeatedBlocks
from lightning_tp.infer.blocks.workload import Workload


class Stack(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.inp = nn.Linear(4, 4)
        self.layers, self.head = (
            nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(depth)),
            nn.Linear(4, 6),
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.inp(x)
        for layer in self.layers:
            x = layer(x)
        return {"logits": self.head(x), "hidden": x}


def workload(depth: int = 5) -> Workload:
    return Workload(Stack(depth), lambda m, x: m(x), torch.zeros(2, 3, 4), 2)


def test_of_identical_blocks_one_is_traced() -> None:
    folded = workload().with_identical_blocks()
    assert folded.blocks.copies == {f"layers.{i}": "layers.0" for i in range(1, 5)}
    run = folded.trace(set(), {})
    assert {name for name, _ in run.trace.nodes} == {"inp.weight", "layers.0.0.weight", "layers.0.1.weight", "head.weight"}
    assert run.ran == {"layers.0"}


def test_without_blocks_all_are_traced_but_what_is_whole() -> None:
    run = workload(2).trace({("head.weight", 0)}, {})
    assert {name for name, _ in run.trace.nodes} == {f"layers.{i}.{j}.weight" for i in range(2) for j in range(2)} | {"inp.weight"}
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
    one = Workload(
        one.model, lambda m, x: m.layers[4](m.layers[0](x)[:, :2]), one.inputs, 2, RepeatedBlocks({"layers.4": "layers.0"})
    )
    assert one.trace(set(), {}).ran == {"layers.0", "layers.4"}
