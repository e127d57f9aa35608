"""Predictions beside measurements that others have published; all of them: `benchmarks/published.py`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
published = pytest.importorskip("published")


@pytest.fixture(scope="module")
def rows():
    return published.runs()[1]


SOME = [  # source, model, dp, tp, batch
    ("llm-foundry", "MPT 1B", 16, 1, 20),
    ("llm-foundry", "MPT 7B", 128, 1, 6),
    ("torchtitan-a100", "Llama 2 13B", 64, 1, 2),
    ("torchtitan-h100", "Llama 3 8B", 8, 1, 2),
    ("torchtitan-h100", "Llama 3 8B", 8, 8, 12),
    ("fms-fsdp", "Llama 2 7B", 96, 1, 2),
    ("torchtune", "Llama 3.2 3B", 1, 1, 2),
    ("litgpt", "Llama 2 7B, LoRA", 1, 1, 2),
]


@pytest.mark.parametrize(("source", "model", "dp", "tp", "batch"), SOME)
def test_speed_within_15_and_memory_within_10_percent(rows, source, model, dp, tp, batch):
    run = next(r for r in rows if (r.source, r.model, r.dp, r.tp, r.batch) == (source, model, dp, tp, batch))
    pair = published.pair(run)
    assert pair.speed is not None or pair.memory is not None
    assert pair.speed is None or abs(pair.speed) < 0.15
    assert pair.memory is None or abs(pair.memory) < 0.10
