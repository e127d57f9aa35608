from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_tp import TPError
from lightning_tp.core.units import size
from lightning_tp.estimate import Estimate, estimate
from lightning_tp.estimate.cost.hardware import hardware
from lightning_tp.estimate.drawn.pages import _matmuls_table, check_page, report, write_choices, write_plan
from lightning_tp.estimate.drawn.picture_from_trace import picture_of
from lightning_tp.estimate.drawn.series import color_of, kinds_of
from lightning_tp.estimate.report.tuning import TuningReport
from lightning_tp.estimate.tune import tune
from lightning_tp.plan.plan import Plan
from tests.estimate.drawn.html_page import Parsed, parsed_page
from tests.estimate.models import MODELS

SMALL = dataclasses.replace(hardware("h100"), memory_bytes=1e5, reserved_bytes=0)
MODEL = (nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)), (torch.ones(2, 512),))


def test_report(found: Estimate, tmp_path: Path) -> None:
    path = tmp_path / "found.html"
    found.html(path, command="lightning-tp estimate <mine> --tp 2")
    text = path.read_text()
    page, words = parsed_page(text), " ".join(Parsed(text).text)
    for a in (*found.assumptions, found.plan, "lightning-tp estimate <mine> --tp 2", torch.__version__, "tp=2 x dp=4"):
        assert a in words
    assert f"{found.tokens_per_s:,.0f}" in words and f"{found.mfu:.1%}" in words
    assert "norms" in words and "rowwise" in words and "partial sums" in words
    ids = {v for _, k, v in page.attributes if k == "id"}
    assert {v[1:] for _, k, v in page.attributes if k == "href"} <= ids
    assert page.tags["table"] >= 6 and page.tags["details"] >= 3 and page.tags["svg"] == 12
    assert f"together {found.flops.rank * 2 / found.flops.model:.1%} of the model's" in " ".join(words.split())
    for kind, n in found.memory.peak.kinds.items():
        assert f"{kind} {size(n)}" in words


def test_names_are_escaped(tmp_path: Path) -> None:
    class Evil(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("<script>alert(1)</script>", nn.Linear(8, 32))
            self.add_module('"><b onclick="x', nn.Linear(32, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = self._modules.values()
            return second(torch.relu(first(x)))  # type: ignore[misc]

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Evil(), Evil()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x

    Pair.__name__ = "<script>Pair</script>"
    found = estimate(Pair(), (torch.ones(2, 4, 8),), (1, 2), loss_fn=lambda y: y.mean(), precision="32-true")
    text = report(found, command="<script>")
    page = parsed_page(text)
    assert "<script" not in text and "<b " not in text
    assert any("<script>alert(1)</script>" in t for t in page.text)
    found.plot(tmp_path / "x.svg")
    assert not Parsed((tmp_path / "x.svg").read_text()).open


def test_matmuls_are_bound_by_what_takes_longer(found: Estimate) -> None:
    hw, bounds = found.hardware, set()
    for row, p in zip(_matmuls_table(found).rows, found.products):
        by_compute = p.flops / found.peak_flops >= p.bytes * p.count / hw.memory_bandwidth
        assert row[-1] == ("compute" if by_compute else "memory") and row[:2] == (p.module, p.phase) and row[3] == f"{p.count:,}"
        bounds.add(row[-1])
    assert bounds == {"memory"}  # it is small
    fast = dataclasses.replace(found, hardware=dataclasses.replace(hw, memory_bandwidth=1e18))
    assert {row[-1] for row in _matmuls_table(fast).rows} == {"compute"}


def test_wide_and_narrow_figures_are_shown_by_turns(found: Estimate) -> None:
    text = report(found)
    classes = [v for t, k, v in Parsed(text).attributes if (t, k) == ("svg", "class")]
    assert classes == ["wide", "narrow"] * 6
    for rule in ("svg.narrow { display: none }", "svg.wide { display: none }", "prefers-color-scheme: dark", "@media print"):
        assert rule in text
    ids = [v for _, k, v in Parsed(text).attributes if k == "id"]
    assert len(ids) == len(set(ids))


def test_without_fsdp_or_blocks() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    for mesh in ((1, 1), (1, 2), (2, 1)):
        found = estimate(model, (torch.ones(2, 4, 8),), mesh, loss_fn=lambda y: y.mean(), precision="32-true")
        parsed_page(report(found))
    assert estimate(model, (torch.ones(2, 4, 8),), (1, 1), loss_fn=lambda y: y.mean()).traced is not None
    assert "traced" not in json.loads(found.to_json())


def test_a_step_that_does_not_fit(found: Estimate) -> None:
    words = " ".join(Parsed(report(found)).text)
    assert "fits in memory" in words and "too much" not in words
    small = estimate(*MODEL, (1, 2), loss_fn=lambda y: y.mean(), hardware=SMALL)
    words = " ".join(" ".join(Parsed(report(small)).text).split())
    assert (
        f"does not fit in memory : {size(small.needed)} of {size(small.hardware.memory_bytes)} per device, {size(small.over)} too much"
        in words
    )


def test_plan(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    plan = Plan({"0": "colwise", "2": "rowwise"}).check(model, 2)
    picture = picture_of(model, (torch.ones(2, 4, 8),), plan, loss_fn=lambda y: y.mean())
    write_plan(plan, picture, tmp_path / "plan.html", command="lightning-tp plan", held=["A rank sends <nothing>."])
    page = parsed_page((tmp_path / "plan.html").read_text())
    words = " ".join(page.text)
    assert page.tags["svg"] == 2 and "A rank sends <nothing>." in words and str(plan).splitlines()[0] in words
    assert "column-wise" in words and "(32, 8) -> (16, 8)" in words and "Sharding plan of Sequential, tp=2" in words


def test_choices(tmp_path: Path) -> None:
    build, inputs, loss = MODELS["llama"]()
    found = tune(
        build(), inputs, 6, 12, hardware_="t4", precisions=("32-true",), tps=(1, 2, 4), checkpointing=(None,), loss_fn=loss
    )
    assert found.refused
    write_choices(found, tmp_path / "choices.html", command="lightning-tp tune")
    page = parsed_page((tmp_path / "choices.html").read_text())
    words = " ".join(page.text)
    assert all(r.why in words for r in found.refused) and all(f"{e.tokens_per_s_per_device:,.0f}" in words for e in found.fits)
    bars = [dict(re.findall(r"([\w-]+):([^;]+)", v)) for t, k, v in page.attributes if (t, k) == ("i", "style") and "width" in v]
    most = max(max(e.memory.peak.total, e.hardware.usable_bytes) for e in found.fits)
    wanted = [(color_of(k), 100 * e.memory.peak.kinds[k] / most) for e in found.fits for k in kinds_of([e.memory.peak])]
    assert [b["--c"] for b in bars] == [color for color, _ in wanted]
    assert [float(b["width"].rstrip("%")) for b in bars] == pytest.approx([n for _, n in wanted], abs=0.01)
    limits = [v for t, k, v in page.attributes if (t, k) == ("b", "style")]
    assert limits == [f"left:{round(100 * e.hardware.usable_bytes / most, 2)}%" for e in found.fits]


def test_no_choice_fits(tmp_path: Path) -> None:
    found = tune(*MODEL, 2, 2, hardware_=SMALL, loss_fn=lambda y: y.mean())
    assert not found.fits
    write_choices(found, tmp_path / "choices.html")
    words = " ".join(parsed_page((tmp_path / "choices.html").read_text()).text)
    assert "0 configurations at a global batch size of 2" in words and "Not possible" in words and "Assumptions" not in words


@pytest.mark.parametrize(("name", "word"), [("x.txt", "Name the file .html"), ("nowhere/x.html", "no folder nowhere")])
def test_check_page_refuses(name: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TPError, match=word):
        check_page(name, "--html")
    check_page("x.html")
    check_page("x.HTM")


def test_only_pages_with_figures_need_matplotlib(found: Estimate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it raises
    with pytest.raises(TPError, match=r'pip install "lightning-tp\[plot\]"'):
        found.html(tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()
    check_page(tmp_path / "x.html")


def test_a_file_that_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refused)
    with pytest.raises(TPError, match="No space left on device"):
        write_choices(TuningReport((), (), 2, 2), tmp_path / "x.html")
