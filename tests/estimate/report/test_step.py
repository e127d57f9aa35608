"""An estimate as tables and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest

from lightning_tp.core.units import seconds, size
from lightning_tp.estimate import Estimate, estimate
from lightning_tp.estimate.cost.hardware import hardware
from tests.estimate.models import TOKENS, meta_llama


@pytest.fixture(scope="module")
def found() -> Iterator[Estimate]:
    yield estimate(meta_llama(), TOKENS, (4, 2))


def test_what_it_says(found: Estimate) -> None:
    text = str(found)
    for word in (
        "tokens/s",
        "MFU",
        "all-gather",
        "parameters",
        "Assumed:",
        "us between nodes",
        "Peak memory of a rank",
        "without overlap",
    ):
        assert word in text
    values = json.loads(found.to_json())
    assert values["memory"]["peak"]["total"] == found.memory.peak.total == max(m.total for m in found.memory.timeline)
    assert values["tokens_per_s"] == found.tokens_per_s and values["hardware"]["key"] == "h100"
    assert {p["m"] for p in values["products"]} and values["collectives"][0]["kind"]
    assert "traced" not in values and values["fits"] is True and values["mfu"] == found.mfu


def test_rates(found: Estimate) -> None:
    assert found.tokens_per_s == found.tokens / found.time.step and found.tokens_per_s_per_device == found.tokens_per_s / 8
    assert found.mfu == pytest.approx(found.flops.model * 4 / (found.time.step * 8 * found.peak_flops))
    twice = replace(found, accumulate=2, time=replace(found.time, step=2 * found.time.step))
    assert twice.mfu == pytest.approx(found.mfu)


def test_what_a_device_needs(found: Estimate) -> None:
    device = replace(hardware("h100"), fragmentation=0.5, reserved_bytes=1000)
    needed = 1.5 * found.memory.peak.total + 1000
    fits, over = (replace(found, hardware=replace(device, memory_bytes=limit)) for limit in (needed, needed - 1))
    assert fits.needed == needed and fits.fits and fits.over == 0
    assert not over.fits and over.over == 1
    assert f"fits in memory ({size(needed)} of {size(needed)})" in fits.headline
    assert f"out of memory: {size(needed)} of {size(needed - 1)}, 1 bytes too much" in over.headline
    assert fits.headline.startswith("Llama (1.2M parameters) on 8 x NVIDIA H100 SXM 80 GB, tp=2 x dp=4: ")


def test_tables(found: Estimate) -> None:
    held, peak, collectives, time = (table.rows for table in found.tables())
    memory = found.memory
    assert held[0] == ("parameters", size(memory.parameters))
    largest = max(memory.activations, key=lambda kind: memory.activations[kind])
    assert held[4] == (f"saved activations: {largest}", size(memory.activations[largest]))
    assert peak[0][1] == size(max(memory.peak.kinds.values())) and peak[-2][:2] == ("total", size(memory.peak.total))
    assert peak[-1] == ("with allocator overhead", size(found.needed), f"of {size(found.hardware.memory_bytes)}")
    assert sum(int(row[3].replace(",", "")) for row in collectives) == sum(c.count for c in found.collectives)
    parts = dict(time)
    t = found.time
    assert parts["exposed FSDP2 communication"] == f"{seconds(t.dp_exposed)} of {seconds(t.dp)}"
    assert parts["matmuls (GEMMs)"] == seconds(t.products) and parts["CPU launch overhead"] == seconds(t.host)
    assert parts["TP communication (not overlapped)"] == seconds(t.tp) and parts["step"] == seconds(t.step)
    assert f"Peak memory of a rank, in the {memory.peak.name}" in str(found)
