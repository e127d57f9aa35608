"""What `shapes` found, as tables and sentences."""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from torch import nn

import lightning_tp as ltp
from lightning_tp.estimate.cost.hardware import hardware
from lightning_tp.estimate.cost.products import Lost, MatmulShape
from lightning_tp.estimate.report.matmul import Shapes, StudyPoint, _module_names, tables, text, verdict


def test_the_verdict_says_which_and_why() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2048, 16384), nn.GELU(), nn.Linear(16384, 2048))
    found = ltp.shapes(
        model, (torch.empty(1, 2048, device="meta"),), gpus=8, local_batches=[16, 8192], tps=[1, 8], loss_fn=lambda y: y.mean()
    )
    few, many = found.cell(16, 8), found.cell(8192, 8)
    assert few is not None and many is not None
    saved = found.saved(few), found.saved(many)
    assert saved[0] is not None and saved[1] is not None
    assert saved[0] > 0.5 and abs(saved[1]) < 0.1  # 16 rows read all weights
    line = found.verdict()[0]
    assert line.startswith("tp=8, matmuls against tp=1: gains") and "16 (fewer bytes for each FLOP)" in line
    assert f"{saved[0]:.0%} of matmul time" in line
    assert "samples/s" in " ".join(found.verdict())
    assert "tp=1 x dp=8" not in str(found)  # several batches: no single products


def matmul(seconds: float, lost: Lost, flops: int = 100) -> MatmulShape:
    return MatmulShape(
        ("l.*.up",), "forward", "product", 1, 8, 8, 8, "bfloat16", (2,), flops, 50, seconds, (64, 64), 1, 0.25, 0.5, lost
    )


def point(tp: int, local_batch: float, seconds: float, possible: bool = True, **lost: float) -> StudyPoint:
    attention = replace(matmul(5.0, Lost()), kind="attention")
    shapes = (matmul(seconds, Lost(**lost)), attention)
    return StudyPoint(
        tp, 8 // tp, local_batch, local_batch * tp, local_batch * tp * 16, possible, "" if possible else "why", shapes, None
    )


def study(*points: StudyPoint) -> Shapes:
    return Shapes("Net", 10**9, 8, 16, hardware("h100"), points, {4: "it does not divide"})


def test_numbers_of_a_point() -> None:
    found = point(2, 1, 3.0, memory=0.5)
    assert [s.kind for s in found.products] == ["product"]  # attention is no matmul here
    assert (found.flops, found.seconds, found.flop_s, found.intensity) == (200, 6.0, 200 / 6, 2.0)
    assert found.lost == Lost(memory=1.0) and found.gathered is found.sent is None


def test_savings_are_against_the_smallest_tp() -> None:
    one, two = point(1, 1, 4.0), point(2, 1, 3.0)
    found = study(one, two, point(2, 8, 3.0))
    assert found.saved(two) == 0.25 and found.saved(one) == 0 and found.saved(found.cells[2]) is None
    assert found.tps == (1, 2) and found.local_batches == (1, 8) and found.cell(8, 1) is None and found.cell(1, 2) is two


def test_verdicts() -> None:
    points = [point(1, b, 4.0, waves=1.0) for b in (1, 2, 4)]
    points += [
        point(2, 1, 3.0),
        point(2, 2, 4.01, waves=1.01),
        point(2, 4, 5.0, waves=1.0, tiles=1.0),
        point(2, 8, 1.0, possible=False),
    ]
    first, *_, split, missing = verdict(study(*points))
    assert first == (
        "tp=2, matmuls against tp=1: gains 25% of matmul time at a local batch of 1 (fuller last waves); "
        "is even with it at a local batch of 2; loses 25% of matmul time at a local batch of 4 (smaller or split tiles)."
    )
    assert split == "Not possible without splitting sequences, and shown as if they were split evenly: tp=2 at 8."
    assert missing == "Not possible, as there are fewer samples than groups of tp ranks: tp=1 at 8."
    gains = verdict(study(point(1, 1, 4.0), point(1, 2, 4.0), point(2, 1, 3.0), point(2, 2, 2.0)))[0]
    assert "gains 25% to 50% of matmul time at a local batch of 1 and 2 (fewer FLOPs)" in gains
    assert "nothing to compare" in verdict(study(point(1, 1, 4.0)))[0]


def test_tables() -> None:
    found = study(point(1, 1, 4.0, padding=1.0), point(2, 1, 3.0))
    summary, one, _ = tables(found, details=True)
    assert len(tables(found, details=False)) == 1
    title, header, rows = summary
    assert title.startswith("Matmuls (GEMMs) of a step") and "kernel launch latency" in title
    row = dict(zip(header, rows[0]))
    assert (row["rows"], row["padding"], row["saved"], row["fits"]) == ("16", "25.0%", "", "-") and rows[1][
        header.index("saved")
    ] == "+25.0%"
    matmuls = dict(zip(one[1], one[2][0]))
    assert (matmuls["matmuls"], matmuls["count"], matmuls["tile"], matmuls["share"]) == ("l.*.up", "2", "64x64", "44.4%")
    assert one[2][1][1] == "forward, attention"
    assert found.headline == "Net (1.0B parameters) on 8 x NVIDIA H100 SXM 80 GB, samples of 16 tokens"
    assert text(found).splitlines()[0] == found.headline and "tp=4 was left out: it does not divide" in str(found)
    assert "tp=1 x dp=8 at a local batch of 1" in str(found) and "tp=1 x dp=8" not in text(found, details=False)


def test_names_of_modules() -> None:
    assert _module_names(["l.*.up", "l.*.gate"]) == "l.*.up, gate" and _module_names([""]) == "(the model)"
    assert _module_names(["a" * 40, "b" * 40]) == f"{'a' * 40} and 1 more"


def test_json() -> None:
    values = json.loads(study(point(1, 1, 4.0, memory=1.0), point(2, 1, 3.0)).to_json())
    assert values["hardware"] == "h100" and values["left_out"] == {"4": "it does not divide"} and len(values["verdict"]) == 1
    first, second = values["cells"]
    assert (first["flops"], first["seconds"], first["saved"], second["saved"], first["step"]) == (200, 8.0, 0, 0.25, None)
    assert first["lost"]["memory"] == 2.0 and first["shapes"][0]["lost"]["memory"] == 1.0 and first["shapes"][0]["count"] == 2
