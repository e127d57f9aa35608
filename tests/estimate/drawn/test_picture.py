from __future__ import annotations

import pytest

from lightning_tp.estimate.drawn.picture import Box, Communication, Frame, Picture, SideBySide, State, Weight

q, k, v = (Box(name, "Linear", "column-wise", "columns") for name in "qkv")
gather, reduce = Communication("all-gather", "reduce-scatter", 64), Communication("", "all-reduce", 32)


def test_boxes_and_communications_are_in_order() -> None:
    picture = Picture("Net", 2, (gather, Frame("attn", "Attention", (SideBySide((q, k)), reduce, v))), "", {}, "given")
    assert [box.name for box in picture.boxes()] == ["q", "k", "v"]
    assert list(picture.communications()) == [gather, reduce]
    assert picture.title == "Sharding plan of Net, tp=2"


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (State(), ""),
        (State((), (2, 8)), "2 x 8"),
        (State((2, 8), (2, 8), "replicated"), "2 x 8, replicated"),
        (State((2, 8), (2, 4), "features"), "2 x 4 of 2 x 8, feature-sharded"),
        (State((2, 8, 4), (1, 4, 4), "sharded"), "1 x 4 x 4 of 2 x 8 x 4, sharded"),
        (State((2, 8), (2, 8), "partial"), "2 x 8, partial sums"),
    ],
)
def test_words_of_states(state: State, words: str) -> None:
    assert state.words == words


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (gather, "all-gather, backward: reduce-scatter"),
        (reduce, "backward: all-reduce"),
        (Communication("", "", 0, where="h.3 only, instead"), "h.3 only, instead: no collective"),
        (Communication("all-reduce", "", 8, times=3, where="h.0 only"), "h.0 only: 3 x all-reduce"),
    ],
)
def test_words_of_communications(row: Communication, words: str) -> None:
    assert row.words == words


def test_words_of_weights() -> None:
    assert Weight("weight", (8, 4), ((8, 4),), None).words == "8 x 4"
    assert Weight("weight", (8, 4), ((4, 4),), 0).words == "8 x 4 -> 4 x 4"


def test_where_and_why_do_not_make_two_communications_differ() -> None:
    assert Communication("all-reduce", "", 8, reason="a", where="b") == Communication("all-reduce", "", 8)
    assert Communication("all-reduce", "", 8) != Communication("all-reduce", "", 16)
