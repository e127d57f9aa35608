"""What a block does is written down with where its operands come from: equal for blocks that do the same."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_tp.infer.blocks.operation_log import OperationLog
from lightning_tp.infer.follow.run import run


class Block(nn.Module):
    def __init__(self, what: str, shift: Tensor) -> None:
        super().__init__()
        self.a, self.b, self.what, self.shift = nn.Linear(4, 4), nn.Linear(4, 4), what, [shift]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.what == "swapped":
            return self.b(x) * self.a(y)
        if self.what == "outside":
            return self.a(x) * self.b(y) + self.shift[0]
        if self.what == "own":
            return self.a(x) * self.b(y) + self.a.bias
        return self.a(x) * self.b(y) * (0.5 if self.what == "half" else 2.0)


class Model(nn.Module):
    def __init__(self, whats: tuple[str, ...]) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(4))
        self.blocks = nn.ModuleList(Block(w, self.shift) for w in whats)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.relu(block(x, x + 1))
        return x


def entries(*whats: str) -> list[Any]:
    model = Model(whats)
    logs: list[OperationLog] = []

    def log(model: nn.Module, whole: Any, shared: Any) -> OperationLog:
        logs.append(OperationLog(model, {f"blocks.{i}": b for i, b in enumerate(model.blocks)}))
        return logs[-1]

    run(model, lambda m, x: m(x), torch.zeros(2, 4), set(), {}, tracer_of=log)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return list(logs[0].entries.values())


def test_equal_blocks_have_equal_entries_whatever_they_scale_by() -> None:
    a, b, c = entries("", "", "half")
    assert a == b == c
    assert len(a) > 5


def test_an_operand_from_elsewhere_makes_another_entry() -> None:
    plain, swapped, outside, own = entries("", "swapped", "outside", "own")
    assert len({str(e) for e in (plain, swapped, outside, own)}) == 4


def test_operations_between_blocks_are_not_written_down() -> None:
    (one,) = entries("")
    assert not any("relu" in str(entry[0]) for entry in one)
