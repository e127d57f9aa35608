"""The study of matmuls in `benchmarks/`, on a Llama whose matmuls are counted by hand."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_tp import TPError, estimate
from lightning_tp.estimate.cost.hardware import hardware
from tests.estimate.models import V, gpt2, llama

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
study_matmuls = pytest.importorskip("study_matmuls")
import shapes as eight_models  # noqa: E402
from matmul_study import measure, study  # noqa: E402
from matmul_study.products import Lost  # noqa: E402
from matmul_study.report import Shapes, StudyPoint  # noqa: E402

T, H100 = 64, hardware("h100")


def found_for(make: Any, **kwargs: Any) -> Shapes:
    build, inputs, loss_fn = make()
    with torch.device("meta"):
        model = build()
    return study.shapes(model, inputs, gpus=4, loss_fn=loss_fn, tps=(1, 2, 4), **kwargs)


@pytest.fixture(scope="module")
def of_llama() -> Shapes:
    return found_for(llama, local_batches=[0.5, 1])


def counted(cell: StudyPoint) -> Counter[tuple[str, int, int, int]]:
    found: Counter[tuple[str, int, int, int]] = Counter()
    for s in cell.products:
        assert s.batch == 1
        found["grad" if s.role.startswith(("grad", "backward")) else s.role, s.m, s.n, s.k] += s.count
    return found


def three(rows: int, n: int, k: int, times: int) -> Counter[tuple[str, int, int, int]]:
    """Forward (rows, k) x (k, n), gradient of the input (rows, n) x (n, k), gradient of the weight (n, rows) x (rows, k)."""
    return (
        Counter({("forward", rows, n, k): times}) + Counter({("grad", rows, k, n): times}) + Counter({("grad", n, k, rows): times})
    )


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_products_of_a_llama_by_hand(of_llama: Shapes, tp: int) -> None:
    cell = of_llama.cell(1, tp)
    assert cell is not None and cell.possible and cell.tokens == tp * T
    rows, h, f, kv = tp * T, 128, 344, 64  # width, inner width, 4 key/value heads of 16
    expected = three(rows, h // tp, h, 5) + three(rows, h, h // tp, 5)  # q; o
    expected += three(rows, kv // tp, h, 10)  # k, v
    expected += three(rows, f // tp, h, 10) + three(rows, h, f // tp, 5)  # gate, up; down
    expected += three(rows, V // tp, h, 1)
    assert counted(cell) == expected


def test_roles(of_llama: Shapes) -> None:
    cell = of_llama.cell(1, 1)
    assert cell is not None
    down = {s.role: (s.m, s.n, s.k) for s in cell.products if any(m.endswith("feed_forward.w2") for m in s.modules)}
    assert down == {"forward": (T, 128, 344), "grad of input": (T, 344, 128), "grad of weight": (128, 344, T)}
    attention = [s for s in cell.shapes if s.kind == "attention"]
    assert {s.role for s in attention} == {"forward", "backward"} and all((s.m, s.n) == (T, T) for s in attention)


def test_flops_are_equal_at_an_equal_global_batch(of_llama: Shapes) -> None:
    for local in (0.5, 1):
        cells = [c for c in of_llama.cells if c.local_batch == local]
        assert len(cells) == 3 and len({c.flops for c in cells}) == 1
        assert (
            len({sum(s.flops * s.count for s in c.shapes) for c in cells}) == 1
        )  # with attention, which split sequences don't shorten
    whole, half = of_llama.cell(1, 1), of_llama.cell(0.5, 1)
    assert whole is not None and half is not None and whole.flops == 2 * half.flops
    assert (
        [c.tp for c in of_llama.cells if not c.possible] == [1] and half.estimate is None and "2 samples for 4 devices" in half.why
    )


def test_agrees_with_estimate(of_llama: Shapes) -> None:
    build, inputs, _ = llama()
    with torch.device("meta"):
        model = build()
    for tp in (1, 4):
        cell = of_llama.cell(1, tp)
        alone = estimate(model, inputs, (4 // tp, tp), batch=tp)
        assert cell is not None
        assert sum(s.flops * s.count for s in cell.shapes) == alone.flops.rank
        assert cell.seconds == pytest.approx(alone.time.products)
        assert sum(s.seconds * s.count for s in cell.shapes) == pytest.approx(alone.time.products + alone.time.attention)
        assert cell.estimate is not None and cell.estimate.time.step == alone.time.step
        assert cell.sent == sum(c.bytes * c.count for c in alone.collectives if c.axis == "tp")
        assert (cell.sent == 0) == (tp == 1) and (cell.gathered == 0) == (tp == 4)


def test_heads_that_tp_does_not_divide() -> None:
    build, inputs, _ = gpt2()
    with torch.device("meta"):
        model = build()
    found = study.shapes(model, inputs, gpus=6, tps=[1, 3], local_batches=[1])  # 8 heads: 3, 3 and 2
    one, three_ = found.cells
    assert "uneven" in three_.why and three_.flops > 1.03 * one.flops
    widest = max(s.n for s in three_.products if s.role == "forward" and any("c_attn" in m for m in s.modules))
    assert widest == 3 * 3 * 16


def test_samples_without_a_sequence_can_not_be_split() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    found = study.shapes(model, (torch.empty(2, 8),), gpus=2, local_batches=[0.5, 1], tps=[1, 2], loss_fn=lambda y: y.mean())
    assert found.seq is None and found.cell(0.5, 1) is None and found.cell(0.5, 2) is not None
    assert "Not possible, as there are fewer samples than groups of tp ranks: tp=1 at 0.5." in found.verdict()
    assert "samples/s" in str(found) and "rows" not in str(found)
    with pytest.raises(TPError, match="less than one sample"):
        study.shapes(model, (torch.empty(2, 8),), gpus=2, local_batches=[0.5], tps=[1], loss_fn=lambda y: y.mean())


@pytest.fixture
def config(tmp_path: Path) -> str:
    values = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 256, "hidden_size": 64, "intermediate_size": 160,
        "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 96,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    return str(tmp_path / "config.json")


def test_command(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study_matmuls.main([config, "--gpus", "4", "--global-batch", "4", "--tp", "1,2"]) == 0
    text = capsys.readouterr().out
    assert "samples of 96 tokens" in text and "grad of weight" in text and "tp=2, matmuls against tp=1" in text
    plot = tmp_path / "tp.svg"
    arguments = ["--local-batch", "0.5,1", "--tp", "1,2", "--seq", "64", "--json", "--plot", str(plot)]
    assert study_matmuls.main([config, "--gpus", "4", *arguments, "--measure", "--seconds", "0.2"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["gpus"] == 4 and values["seq"] == 64 and values["hardware"] == "h100" and len(values["cells"]) == 4
    first = values["cells"][0]
    assert not first["possible"] and first["step"] is None and first["saved"] == 0
    row = first["shapes"][0]
    assert {"m", "n", "k", "count", "flops", "intensity", "padding", "idle", "flop_s", "tile", "lost"} <= row.keys()
    assert set(row["lost"]) == set(Lost._fields) and values["measured"]["products"]
    assert plot.read_text().count("tp=2") >= 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--tp", "1,x"], "`--tp 1,x`"),
        (["--tp", "3"], "does not divide"),
        (["--local-batch", "-1"], "above 0"),
        (["--gpus", "0"], "`--gpus 0`"),
    ],
)
def test_mistakes_end_with_status_2(config: str, arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert study_matmuls.main([config, *arguments]) == 2
    found = capsys.readouterr()
    assert word in found.err and found.err.count("\n") == 1 and not found.out


def test_all_seconds_have_a_reason(of_llama: Shapes) -> None:
    for cell in of_llama.cells:
        for s in cell.products:
            ideal = s.flops / (H100.peak(torch.bfloat16) * H100.product_efficiency * H100.sustained)
            assert ideal + sum(s.lost) == pytest.approx(s.seconds) and min(s.lost) > -1e-12 and s.lost.start > 0


def test_the_verdict_says_which_and_why() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2048, 16384), nn.GELU(), nn.Linear(16384, 2048))
    inputs = (torch.empty(1, 2048, device="meta"),)
    found = study.shapes(model, inputs, gpus=8, local_batches=[16, 8192], tps=[1, 8], loss_fn=lambda y: y.mean())
    few, many = (found.saved(found.cell(b, 8)) for b in (16, 8192))
    assert few > 0.5 and abs(many) < 0.1  # 16 rows read all weights
    line = found.verdict()[0]
    assert line.startswith(
        f"tp=8, matmuls against tp=1: gains {few:.0%} of matmul time at a local batch of 16 (fewer bytes for each FLOP)"
    )


def test_what_takes_too_long_is_left_out(of_llama: Shapes) -> None:
    measured = measure.measure(of_llama, seconds=0.02, device="cpu")
    keys = {measure.key_of(s) for c in of_llama.cells for s in c.products}
    assert measured.seconds.keys() | measured.left_out.keys() == keys and not measured.seconds.keys() & measured.left_out.keys()
    assert all("too long" in why for why in measured.left_out.values())


def test_prediction_of_eight_models(capsys: pytest.CaptureFixture[str]) -> None:
    eight_models.print_predicted()
    assert "Llama 3.1 405B" in capsys.readouterr().out
