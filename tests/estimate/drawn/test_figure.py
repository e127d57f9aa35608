from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from lightning_tp import TPError
from lightning_tp.estimate.drawn.figure import INK, NARROW, WIDE, Chart, check_plot, figure_of, inline_svg, save

SQUARES = Chart("Squares of $x and y$", 1.5, lambda axes: axes.bar([1, 2], [1, 4]), {"of <x>": "#3182bd", "of y": "#e6550d"})
LINE = Chart("A line", 1.0, lambda axes: axes.plot([0, 1.23456789], [0, 1.23456789], color=INK), ticks=False)


def test_charts_are_as_high_as_they_say_and_do_not_overlap() -> None:
    figure = figure_of([SQUARES, LINE])
    above, below = figure.axes
    width, height = figure.get_size_inches()
    assert width == WIDE and above.get_position().height * height == pytest.approx(1.5)
    legend = above.get_legend()
    assert legend is not None and [t.get_text() for t in legend.get_texts()] == ["of <x>", "of y"]
    figure.draw_without_rendering()
    boxes = [below.get_tightbbox(), above.get_window_extent(), legend.get_window_extent()]
    assert boxes[0].y1 <= boxes[2].y0 and boxes[2].y1 <= boxes[1].y0


def test_narrow_figures_wrap_titles_and_legends() -> None:
    long = SQUARES._replace(title="A title of many words " * 4, legend={f"{i} of a kind with a long name": "k" for i in range(4)})
    figure = figure_of([long], NARROW)
    figure.draw_without_rendering()
    box = figure.axes[0].get_tightbbox()
    assert box.x0 >= 0 and box.x1 <= 100 * NARROW and box.y0 >= 0 and box.y1 <= 100 * figure.get_figheight()


@pytest.mark.parametrize(("suffix", "begin"), [(".svg", b"<?xml"), (".png", b"\x89PNG"), (".PDF", b"%PDF")])
def test_save_writes_the_same_bytes_each_time(suffix: str, begin: bytes, tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        save(figure_of([SQUARES]), tmp_path / f"{name}{suffix}", "Squares")
        contents.append((tmp_path / f"{name}{suffix}").read_bytes())
    assert contents[0].startswith(begin) and contents[0] == contents[1]


def test_inline_svg_has_the_colors_of_its_page() -> None:
    text = str(inline_svg(figure_of([SQUARES, LINE]), 'Squares "of" <x>', "wide"))
    root = ET.fromstring(text.replace("xlink:href", "href"))
    assert root.attrib["class"] == "wide" and root.attrib["aria-label"] == 'Squares "of" <x>'
    assert root.attrib["viewBox"].split()[2:] == ["633.6", f"{72 * figure_of([SQUARES, LINE]).get_figheight():g}"]
    assert "currentColor" in text and INK not in text and "http" not in text and "style>" not in text
    words = {element.text for element in root.iter("text")}
    assert {"Squares of $x and y$", "of <x>", "A line"} <= words
    points = re.findall(r" d=\"[^\"]*\"", text)
    assert points and not re.search(r"\.\d\d", " ".join(points))


def test_figures_of_a_page_share_no_ids() -> None:
    """One in a figure that is not displayed names nothing for the other."""

    def ids(css_class: str) -> set[str]:
        return set(re.findall(r' id="(\w+)"', inline_svg(figure_of([SQUARES]), "Squares", css_class)))

    assert ids("wide") and not ids("wide") & ids("narrow")


@pytest.mark.parametrize(("name", "word"), [("x.bmp", ".svg, .png, .pdf"), ("x", ".svg"), ("nowhere/x.svg", "no folder nowhere")])
def test_check_plot_refuses(name: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TPError, match=re.escape(word)):
        check_plot(name, "--plot")
    check_plot("x.SVG")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it raises
    with pytest.raises(TPError, match=r'`--plot .*x\.svg` needs matplotlib: pip install "lightning-tp\[plot\]"'):
        check_plot(tmp_path / "x.svg", "--plot")


def test_a_file_that_can_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(TPError, match=r"x\.svg` can't be written: No such file"):
        save(figure_of([LINE]), tmp_path / "gone" / "x.svg")
