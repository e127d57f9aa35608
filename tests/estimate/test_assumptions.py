from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_tp.estimate.assumptions import assumptions_of
from lightning_tp.estimate.cost.hardware import hardware
from lightning_tp.estimate.rank.settings import PRECISIONS, Options, Settings
from tests.estimate.by_hand import model_of, step

MODEL = model_of(step(), {"layers.0": "layers.0", "layers.1": "layers.1", "layers.2": "layers.1"})


def text(tp: int = 1, dp: int = 1, rank: int = 0, device: str = "h100", precision: str = "bf16-mixed", **options: Any) -> str:
    settings = Settings(tp, dp, rank, PRECISIONS[precision])
    return "\n".join(assumptions_of(MODEL, hardware(device), Options(**options), settings))


def test_of_every_estimate() -> None:
    found = text()
    assert "989 TFLOP/s, 3,350 GB/s" in found and "of 3 blocks 2 were traced" in found
    assert f"{hardware('h100').peak(torch.float32) / 1e12:g} TFLOP/s" in text(precision="32-true")
    for words in ("FSDP2", "TP communication", "micro-batch", "holds most"):
        assert words not in found


@pytest.mark.parametrize(
    ("options", "words", "not_words"),
    [
        ({"dp": 2}, "it gathers in bfloat16 and reduces in float32", "micro-batch"),
        ({"dp": 2, "precision": "32-true"}, "it gathers in float32 and reduces in float32", "micro-batch"),
        ({"dp": 2, "accumulate": 2}, "gradients stay unsharded until the last micro-batch", "TP comm"),
        ({"accumulate": 2}, "foreach", "micro-batch"),
        ({"tp": 2}, "TP communication is not overlapped", "holds most"),
        ({"tp": 3, "rank": 2}, "tp=3 does not divide everything evenly: this is rank 2, which holds most", "crosses"),
        ({"tp": 16}, "tp=16 is more than the 8 devices of a node", "FSDP2"),
        ({"compile": True}, "kernels between two matmuls are fused", "eager"),
        ({"fused_attention": False}, "attention is written out and saves its scores", "attention is fused"),
        ({"optimizer": "sgd"}, "eager mode", "foreach"),
        ({"device": "cpu"}, "eager mode", "foreach"),
    ],
)
def test_of_options(options: dict[str, Any], words: str, not_words: str) -> None:
    found = text(**options)
    assert words in found and not_words not in found
