from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lightning_tp import Plan, TPError
from lightning_tp.estimate.drawn.figure import NARROW, WIDE
from lightning_tp.estimate.drawn.picture import Box, Communication, Frame, Picture, SideBySide, State, Weight
from lightning_tp.estimate.drawn.picture_render import STRIPES, draw_picture, plot_plan

FULL, SHARD = (2, 8, 64), (2, 8, 32)
UP = Box(
    "up", "Linear", "column-wise", "columns", (Weight("weight", (64, 64), ((32, 64),), 0), Weight("bias", (64,), ((32,),), 0)),
    State(FULL, FULL, "replicated"), State(FULL, SHARD, "features"), tensor=1,
)  # fmt: skip
DOWN = replace(
    UP, name="down", style="row-wise", cut="rows", arrives=UP.leaves, leaves=State(FULL, FULL, "partial"), notes=("a note",)
)
NORM = Box("norm", "LayerNorm", "replicated", "replicated", (Weight("weight", (64,), ((64,),), None),), reason="small")
TABLE = replace(NORM, name="table", weights=(Weight("weight", (9, 64), ((9, 64),), None),), reason="9 rows")
ATTENTION = Box("attention", "", "4 of 8 (batch x heads), 8 queries, 8 keys", "")
BLOCK = Frame("h.{0-3}", "Block", (NORM, SideBySide((UP, replace(UP, name="gate"))), ATTENTION, DOWN), times=4, block=True)
REDUCE = Communication("all-reduce", "", 4096, reason="sums partial sums", where="h.3 only")
PICTURE = Picture("<Net>", 2, (TABLE, BLOCK, REDUCE), "in order", {"GELU": 4, "Identity": 9}, "given")


def words(figure: Any) -> str:
    return "\n".join(t.get_text() for t in figure.axes[0].texts)


def stripes(figure: Any) -> list[tuple[str, float, float]]:
    """(state, top, bottom) of the pieces of the stripe on the left."""
    from matplotlib.colors import to_hex

    names = {color: state for state, (color, _) in STRIPES.items() if state != "unknown"}
    lines = [(to_hex(c.get_color()[0]), *c.get_segments()[0]) for c in figure.axes[0].collections]
    return [(names[color], top[1], bottom[1]) for color, top, bottom in lines if top[0] == 16]


def test_what_a_picture_says() -> None:
    text = words(draw_picture(PICTURE))
    for line in (
        "Sharding plan of <Net>, tp=2",
        "Plan: given; in order",
        "h.{0-3} x 4: Block",
        "up: Linear",
        "column-wise",
        "64 x 64 -> 32 x 64",
        "input 2 x 8 x 64, replicated",
        "output 2 x 8 x 32 of 2 x 8 x 64, feature-sharded",
        "output 2 x 8 x 64, partial sums",
        "a note",
        "attention: 4 of 8 (batch x heads), 8 queries, 8 keys",
        "h.3 only: all-reduce",
        "sums partial sums, 4.0 KiB",
        "because 9 rows",
        "Not shown (no parameters): 9 Identity, 4 GELU",
    ):
        assert line in text, line
    assert "because small" not in text and "64 -> 32\n" not in text  # a norm; a bias


def test_the_stripe_follows_the_activations() -> None:
    rows = (replace(UP, arrives=State(FULL, FULL, "replicated")), DOWN, replace(REDUCE, where=""))
    found = stripes(draw_picture(replace(PICTURE, rows=rows)))
    assert [state for state, *_ in found] == ["replicated", "replicated", "features", "partial", "replicated"]
    assert all(above[2] == below[1] for above, below in itertools.pairwise(found))
    scattered = (DOWN, Communication("reduce-scatter", "all-gather", 64), NORM, Communication("all-gather", "", 64), NORM)
    found = stripes(draw_picture(replace(PICTURE, rows=scattered)))
    assert [state for state, *_ in found] == ["replicated", "features", "partial", "sequence", "replicated"]


def test_a_rank_has_one_of_tp_stripes_of_a_square() -> None:
    from matplotlib.patches import Rectangle

    for tp, n in ((4, 4), (64, 8)):
        figure = draw_picture(replace(PICTURE, tp=tp, rows=(UP,)))
        squares = [p for p in figure.axes[0].patches if type(p) is Rectangle and p.get_height() == 30]
        assert len(squares) == n and sum(p.get_facecolor()[3] > 0 for p in squares) == 1
        assert sum(p.get_width() for p in squares) == pytest.approx(30)
    rows = [p for p in draw_picture(replace(PICTURE, rows=(DOWN,))).axes[0].patches if type(p) is Rectangle and p.get_width() == 30]
    assert [p.get_height() for p in rows] == [15, 15]


def test_boxes_stand_beside_each_other_where_there_is_room() -> None:
    def tops(width: float) -> list[float]:
        texts = draw_picture(PICTURE, width).axes[0].texts
        return [t.get_position()[1] for t in texts if t.get_text() in ("up: Linear", "gate: Linear")]

    wide, narrow = tops(WIDE), tops(NARROW)
    assert wide[0] == wide[1] and narrow[0] < narrow[1]


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_nothing_is_over_the_edge_or_over_something_else(
    drawn: tuple[nn.Module, Plan, Picture, dict[str, int]], width: float
) -> None:
    from matplotlib.patches import FancyBboxPatch

    figure = draw_picture(drawn[2], width)
    figure.draw_without_rendering()
    axes, height = figure.axes[0], 100 * figure.get_figheight()
    for artist in (*axes.texts, *axes.patches):
        box = artist.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= 100 * width and box.y0 >= 0 and box.y1 <= height, artist
    boxes = [p.get_window_extent() for p in axes.patches if isinstance(p, FancyBboxPatch) and not p.get_facecolor()[3]]
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 or b.y1 <= a.y0
    lines = [t.get_window_extent() for t in axes.texts]
    for i, a in enumerate(lines):
        for b in lines[i + 1 :]:
            assert not a.shrunk(0.8, 0.6).overlaps(b.shrunk(0.8, 0.6)), (axes.texts[i], a, b)


def test_plot_plan(tmp_path: Path) -> None:
    plot_plan(PICTURE, tmp_path / "plan.svg")
    text = (tmp_path / "plan.svg").read_text()
    assert "Sharding plan of &lt;Net&gt;, tp=2" in text and "partial sums" in text
    with pytest.raises(TPError, match=r"\.svg, \.png, \.pdf"):
        plot_plan(PICTURE, tmp_path / "plan.gif")
