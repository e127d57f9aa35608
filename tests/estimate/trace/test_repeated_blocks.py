"""Blocks that do not run count as if they had, and hand on what they would have made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_tp.estimate import estimate
from lightning_tp.estimate.trace.repeated_blocks import RepeatedBlocks
from lightning_tp.estimate.trace.step_trace import End, Tape
from tests.estimate.models import TOKENS, meta_llama


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": "block", "accumulate": 3}])
def test_blocks_that_are_not_followed_count_as_if_they_were(options: dict[str, Any]) -> None:
    """Six layers of which five are alike, against as many that are followed because each has a setting of its own."""
    quick = estimate(meta_llama(), TOKENS, (2, 2), **options)
    model = meta_llama()
    for i, layer in enumerate(model.layers):  # type: ignore[arg-type]
        layer.setting = f"{i}th"
    whole = estimate(model, TOKENS, (2, 2), **options)
    assert quick.memory == replace(whole.memory, timeline=quick.memory.timeline)
    assert [m.total for m in quick.memory.timeline] == [m.total for m in whole.memory.timeline]
    assert sorted(map(str, quick.collectives)) == sorted(map(str, whole.collectives))
    assert quick.flops == whole.flops and quick.time.step == pytest.approx(whole.time.step)


class Recorder:
    """Notes segments, and makes tensors."""

    def __init__(self) -> None:
        self.tapes = [Tape("", "forward")]
        self.in_backward = False
        self.made: list[tuple[int, ...]] = []

    def open_segment(self, block: str, representative: str | None = None) -> None:
        self.tapes.append(Tape(block, "backward" if self.in_backward else "forward", representative))

    def close_segment(self) -> None:
        self.tapes[-1].events.append(End())

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        self.made.append(tuple(shape))
        return torch.zeros(shape, dtype=dtype)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.calls = 0

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None, str]:
        self.calls += 1
        return x * self.weight, mask, "done"


def run(n: int, kinds: list[int], widths: list[int] | None = None) -> tuple[Recorder, RepeatedBlocks, list[Block], Tensor]:
    recorder, blocks = Recorder(), [Block() for _ in range(n)]
    named = {f"layers.{i}": block for i, block in enumerate(blocks)}
    repeated = RepeatedBlocks(recorder, named, dict(zip(named, kinds)))
    x, mask = torch.ones(2, 3, requires_grad=True), torch.ones(2)
    with repeated.watching():
        y: Any = x
        for i, block in enumerate(blocks):
            y, handed_on, word = block(y[: widths[i]] if widths else y, mask)
            assert handed_on is mask and word == "done" and y.requires_grad
        recorder.in_backward = True
        recorder.open_segment("")
        y.sum().backward()
    return recorder, repeated, blocks, x


def test_two_of_a_kind_run() -> None:
    recorder, repeated, blocks, x = run(5, [1] * 5)
    assert [b.calls for b in blocks] == [1, 1, 0, 0, 0]
    assert repeated.followed == {f"layers.{i}": f"layers.{min(i, 1)}" for i in range(5)}
    assert recorder.made == [(2, 3)] * 3 + [(2, 3)] * 3  # outputs, then gradients of inputs
    assert x.grad is not None and x.grad.shape == x.shape
    assert not any("forward" in b.__dict__ for b in blocks)


def test_segments() -> None:
    recorder, *_ = run(4, [1] * 4)
    named = [(t.block, t.phase, t.representative) for t in recorder.tapes if t.block]
    forward = [("layers.0", None), ("layers.1", None), ("layers.2", "layers.1"), ("layers.3", "layers.1")]
    assert named == [(b, "forward", r) for b, r in forward] + [(b, "backward", r) for b, r in reversed(forward)]
    gaps = [t for t in recorder.tapes if not t.block and t.phase == "forward"]
    # what follows a block that ran is part of its segment; what follows one that did not is its representative's
    assert [t.duplicate for t in gaps] == [False, True, False]
    assert [len(t.events) for t in recorder.tapes if t.block == "layers.0" and t.phase == "forward"] == [2]


def test_other_settings_or_inputs_are_another_kind() -> None:
    assert [b.calls for b in run(5, [1, 2, 1, 2, 1])[2]] == [1, 1, 1, 1, 0]
    assert [b.calls for b in run(5, [1] * 5, [2, 2, 1, 1, 1])[2]] == [1, 1, 1, 1, 0]
