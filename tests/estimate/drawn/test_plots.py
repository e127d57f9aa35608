from __future__ import annotations

import builtins
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_tp import TPError
from lightning_tp.cli.main import main
from lightning_tp.estimate import Estimate, estimate
from lightning_tp.estimate.drawn.charts import all_of, bar_of, roofline
from lightning_tp.estimate.drawn.drawing import Drawing, fit, wrap
from lightning_tp.estimate.drawn.pages import report, write_choices
from lightning_tp.estimate.drawn.picture_drawing import NARROW, WIDE
from lightning_tp.estimate.drawn.series import block_collectives, memory_series, roofline_points, stretches, time_parts
from lightning_tp.estimate.tune import tune
from tests.estimate.models import MODELS

VOID = {"meta", "br", "wbr", "hr", "img", "link", "input"}


class Parsed(HTMLParser):
    """Opens and closes of a page, its attributes and its text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, k, v or "") for k, v in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, k, v or "") for k, v in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check_page(text: str) -> Parsed:
    """Balanced, with a title, and nothing from elsewhere."""
    page = Parsed(text)
    assert not page.open and page.tags["title"] > 0 and page.tags["h1"] == 1
    assert "http://" not in text and "https://" not in text and "@import" not in text and "url(" not in text
    assert not page.tags["script"] and not page.tags["link"] and not page.tags["img"]
    assert all(k not in ("src", "onload", "onclick") for _, k, _ in page.attributes)
    assert all(v.startswith("#") for _, k, v in page.attributes if k == "href")
    labels = [v for t, k, v in page.attributes if (t, k) == ("svg", "aria-label")]
    assert len(labels) == page.tags["svg"] and all(labels)
    return page


@pytest.fixture(scope="module")
def found() -> Estimate:
    build, inputs, loss = MODELS["llama"]()
    return estimate(build(), inputs, (4, 2), loss_fn=loss, activation_checkpointing="selective", accumulate=2)


def test_what_is_drawn_are_the_numbers_of_the_estimate(found: Estimate) -> None:
    series, moments = memory_series(found), found.memory.timeline
    for i, moment in enumerate(moments):
        assert {k: v[i] for k, v in series.items() if v[i]} == dict(moment.kinds)
    lines = stretches(found)
    assert [i for s in lines for i in range(s.first, s.last + 1)] == list(range(len(moments)))
    assert max(s.most for s in lines) == found.memory.peak.total
    assert any(s.name == "forward of layers.{0-4}" for s in lines)

    sent = block_collectives(found)
    assert sum(r.total for r in sent) == sum(c.bytes * c.count for c in found.collectives)
    assert sum(r.each * r.blocks for r in sent) == sum(c.count for c in found.collectives)
    assert any(r.blocks == 5 and r.where == "layers.{0-4}" and r.axis == "dp" for r in sent)

    parts = time_parts(found)
    assert sum(p[2] for p in parts) == pytest.approx(found.time.step)
    assert sum(p[3] for p in parts) == pytest.approx(found.time.without_overlap)
    assert {p[0] for p in parts} >= {"matrix products", "collectives, tensor-parallel axis", "collectives, data-parallel axis"}


def test_no_product_is_over_the_roof(found: Estimate) -> None:
    points, hw = roofline_points(found), found.hardware
    assert len(points) == sum(1 for p in found.products if p.kind == "product")
    for p in points:
        assert 0 < p.flops_per_s <= min(found.peak_flops, p.intensity * hw.memory_bandwidth)
    products = [p for p in found.products if p.kind == "product"]
    taken = sum(p.flops / q.flops_per_s for p, q in zip(products, points, strict=True))
    assert taken * found.accumulate == pytest.approx(found.time.products)


def test_bars_are_as_long_as_the_numbers_say(found: Estimate) -> None:
    peak = found.memory.peak
    bars = [s for s in bar_of(found, 204, float(peak.total)).shapes if s.fill in peak.kinds]
    assert {s.fill for s in bars} == {k for k, n in peak.kinds.items() if n}
    for s in bars:
        assert s.points[1][0] == pytest.approx(200 * peak.kinds[s.fill] / peak.total, abs=0.5)


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_nothing_is_drawn_over_the_edge(found: Estimate, width: float) -> None:
    for drawing in (*all_of(found, width), roofline(found, width)):
        assert drawing.label and drawing.height > 50
        for s in drawing.shapes:
            xs, ys = zip(*(s.points if s.kind != "rect" else (s.points[0], tuple(map(sum, zip(*s.points))))))
            assert min(xs) >= 0 and max(xs) <= width + 0.5 and min(ys) >= 0 and max(ys) <= drawing.height + 0.5, s


@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf"])
def test_plot(found: Estimate, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"found{suffix}"
    found.plot(path)
    data = path.read_bytes()
    assert data.startswith({".svg": b"<svg", ".png": b"\x89PNG", ".pdf": b"%PDF"}[suffix])
    if suffix == ".svg":
        page = Parsed(data.decode())
        assert not page.open and "Memory of a rank over a step" in page.text


def test_report(found: Estimate, tmp_path: Path) -> None:
    path = tmp_path / "found.html"
    found.html(path, command="lightning-tp estimate <mine> --tp 2")
    text = path.read_text()
    page, words = check_page(text), " ".join(Parsed(text).text)
    for a in (*found.assumptions, found.plan, "lightning-tp estimate <mine> --tp 2", torch.__version__, "tp=2 x dp=4"):
        assert a in words
    assert f"{found.tokens_per_s:,.0f}" in words and f"{found.mfu:.1%}" in words
    assert "norms" in words and "rowwise" in words
    ids = {v for _, k, v in page.attributes if k == "id"}
    assert {v[1:] for _, k, v in page.attributes if k == "href"} <= ids
    assert page.tags["table"] >= 6 and page.tags["details"] >= 3


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
    page = check_page(text)
    assert "<script" not in text and "<b " not in text
    assert any("<script>alert(1)</script>" in t for t in page.text)
    found.plot(tmp_path / "x.svg")
    assert not Parsed((tmp_path / "x.svg").read_text()).open


def test_without_fsdp_or_blocks() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    for mesh in ((1, 1), (1, 2), (2, 1)):
        found = estimate(model, (torch.ones(2, 4, 8),), mesh, loss_fn=lambda y: y.mean(), precision="32-true")
        check_page(report(found))
    assert estimate(model, (torch.ones(2, 4, 8),), (1, 1), loss_fn=lambda y: y.mean()).traced is not None
    assert "traced" not in json.loads(found.to_json())


def test_choices(tmp_path: Path) -> None:
    build, inputs, loss = MODELS["llama"]()
    found = tune(
        build(), inputs, 6, 12, hardware_="t4", precisions=("32-true",), tps=(1, 2, 4), checkpointing=(None,), loss_fn=loss
    )
    assert found.refused
    write_choices(found, tmp_path / "choices.html", command="lightning-tp tune")
    page = check_page((tmp_path / "choices.html").read_text())
    words = " ".join(page.text)
    assert page.tags["svg"] == len(found.fits) + 2
    assert all(r.why in words for r in found.refused) and all(f"{e.tokens_per_s_per_device:,.0f}" in words for e in found.fits)


# ------------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--plot", "x.bmp"], "there are .svg, .png, .pdf"),
        (["--plot", "x"], "there are .svg"),
        (["--plot", "nowhere/x.svg"], "no folder nowhere"),
        (["--html", "nowhere/x.html"], "no folder nowhere"),
        (["--html", "x.txt"], "name it .html"),
        (["--html", "folder.html"], "a folder"),
    ],
)
def test_files_are_refused_before_the_work_begins(
    options: list[str], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.html").mkdir()
    commands = [["estimate"], ["plan"], *([["tune", "--gpus", "2", "--global-batch", "2"]] if "--html" in options else [])]
    for command in commands:  # there is no such model, which would be the second mistake
        assert main([*command, "nowhere.py:build", *options]) == 2
        found = capsys.readouterr()
        assert word in found.err and found.err.count("\n") == 1 and not found.out


def test_without_matplotlib(
    found: Estimate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    found.plot(tmp_path / "x.svg")
    with pytest.raises(TPError, match=r"lightning-tp\[plot\]"):
        found.plot(tmp_path / "x.png")
    assert main(["estimate", "nowhere.py:build", "--plot", str(tmp_path / "x.pdf")]) == 2
    assert "pip install 'lightning-tp[plot]'" in capsys.readouterr().err


def test_a_file_that_can_not_be_written(found: Estimate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refused)
    for write in (found.plot, found.html):
        with pytest.raises(TPError, match="No space left on device"):
            write(tmp_path / ("x.svg" if write == found.plot else "x.html"))


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef build():\n"
        "    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))\n"
        "    return model, (torch.ones(2, 4, 8),), lambda y: y.mean()\n"
    )
    target, svg, page = f"{tmp_path}/m.py:build", str(tmp_path / "x.svg"), str(tmp_path / "x.html")
    for command in ("estimate", "plan"):
        assert main([command, target, "--tp", "2", "--plot", svg, "--html", page]) == 0
        assert f"Wrote {svg}\nWrote {page}" in capsys.readouterr().out
        words = " ".join(check_page(Path(page).read_text()).text)
        assert f"lightning-tp {command} " in words and "column-wise" in words
    assert main(["estimate", target, "--html", page, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["tp"] == 2 and f"Wrote {page}" in printed.err
    assert main(["plan", target, "--json", "-", "--html", page]) == 0
    assert json.loads(capsys.readouterr().out)["rules"]


# ---------------------------------------------------------------------------------------------------------- the drawing


def test_text_is_cut_and_wrapped() -> None:
    assert fit("short", 100, 12) == "short" and len(fit("x" * 99, 100, 10)) == 17
    assert wrap("one two three", 40, 10) == ["one two", "three"]
    assert wrap("one two three four five", 40, 10, 2)[-1].endswith("..")


def test_colors_of_both_themes_and_of_kinds_nobody_named() -> None:
    d = Drawing(10, 10, 'a "label"')
    d.rect(0, 0, 5, 5, "a new kind", text="<tip>")
    text = d.svg(alone=True)
    name = re.search(r'class="(f-spare\d)"', text)
    assert name is not None and f".{name[1]}{{" in text and "prefers-color-scheme:dark" in text
    assert "&lt;tip&gt;" in text and "&quot;label&quot;" in text
