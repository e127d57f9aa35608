from __future__ import annotations

from dataclasses import replace
from itertools import starmap

from lightning_tp.estimate.drawn.picture import Box, Communication, Frame, Row, SideBySide, State
from lightning_tp.estimate.drawn.picture_collapse import collapse, mark_partial_sums, merge_repeats, put_side_by_side

BOX = Box("mlp", "Linear", "column-wise", "columns")
SCATTER, GATHER, REDUCE = starmap(Communication, [("reduce-scatter", "", 64), ("all-gather", "", 64), ("all-reduce", "", 64)])


def block(i: int, *rows: Row) -> Frame:
    return Frame(f"h.{i}", "Block", rows or (BOX,), block=True)


def test_blocks_that_are_alike_are_drawn_once_where_the_first_stands() -> None:
    other = Box("norm", "Norm", "replicated", "replicated")
    assert collapse([block(0), other, block(1), block(2)]) == [Frame("h.{0-2}", "Block", (BOX,), times=3, block=True), other]


def test_blocks_of_two_kinds() -> None:
    cross = replace(BOX, name="cross")
    rows = collapse([block(0), block(1, BOX, cross), block(2), block(3, BOX, cross)])
    assert [(row.name, row.times) for row in rows] == [("h.{0,2}", 2), ("h.{1,3}", 2)]


def test_the_last_block_ends_in_something_else() -> None:
    rows = collapse([block(0, BOX, SCATTER), block(1, BOX, SCATTER), block(2, BOX, GATHER)])
    frame, instead = rows
    assert isinstance(frame, Frame) and frame.rows == (BOX, SCATTER) and frame.times == 3
    assert isinstance(instead, Communication) and instead.words == "h.2 only, instead: all-gather"


def test_the_first_block_begins_with_something_more() -> None:
    only, frame = collapse([block(0, GATHER, BOX), block(1), block(2)])
    assert isinstance(only, Communication) and only.words == "h.0 only: all-gather"
    assert isinstance(frame, Frame) and frame.rows == (BOX,) and frame.name == "h.{0-2}"


def test_the_last_block_lacks_what_the_others_end_in() -> None:
    _, none = collapse([block(0, BOX, REDUCE), block(1, BOX, REDUCE), block(2)])
    assert isinstance(none, Communication) and none.words == "h.2 only, instead: no collective"


def test_modules_that_differ_in_their_number() -> None:
    experts = [replace(BOX, name=f"experts.{i}") for i in range(3)]
    assert collapse(experts) == [replace(BOX, name="experts.{0-2}", times=3)]
    wider = replace(experts[1], style="row-wise")
    assert len(collapse([experts[0], wider, experts[2]])) == 3
    assert len(collapse([experts[0], REDUCE, experts[1]])) == 3
    assert collapse([replace(BOX, name="up"), replace(BOX, name="down")]) == [replace(BOX, name="up"), replace(BOX, name="down")]


def test_repeats_are_merged() -> None:
    assert merge_repeats([REDUCE, REDUCE, GATHER, REDUCE]) == [replace(REDUCE, times=2), GATHER, REDUCE]
    twice = replace(REDUCE, times=2)
    assert merge_repeats([twice, REDUCE]) == merge_repeats([REDUCE, twice]) == [replace(REDUCE, times=3)]
    attention = [Box("attention", "", style, "") for style in ("4 heads", "8 heads", "4 heads")]
    assert merge_repeats(attention) == [Box("attention", "", "4 heads; 8 heads", "", times=3)]
    assert merge_repeats([BOX, BOX]) == [BOX, BOX]  # modules stay two


def test_side_by_side_are_those_that_read_the_same() -> None:
    q, k, v = (replace(BOX, name=name, tensor=3) for name in "qkv")
    (side,) = put_side_by_side([q, k, v])
    assert side == SideBySide((q, k, v))
    assert put_side_by_side([q, replace(k, tensor=4)]) == [q, replace(k, tensor=4)]
    assert put_side_by_side([q, replace(k, cut="rows")])[1:] == [replace(k, cut="rows")]
    assert put_side_by_side([q, GATHER, k]) == [q, GATHER, k]
    assert put_side_by_side([replace(q, tensor=0), replace(k, tensor=0)]) == [q, k]
    five = put_side_by_side([q, k, v, q, k])
    assert [len(row.boxes) if isinstance(row, SideBySide) else 1 for row in five] == [4, 1]


def test_partial_sums_are_what_the_next_collective_sums() -> None:
    def marked(leaves: State, behind: Row, tp: int = 2) -> State:
        box, _ = mark_partial_sums([replace(BOX, leaves=leaves), behind], tp)
        assert isinstance(box, Box)
        return box.leaves

    whole = State((2, 8), (2, 8), "replicated")
    assert marked(whole, REDUCE) == State((2, 8), (2, 8), "partial")  # 16 elements of 4 bytes
    assert marked(whole, replace(REDUCE, bytes=12)) == whole  # what a loss sums
    assert marked(whole, GATHER) == whole and marked(whole, BOX) == whole
    tokens = State((4, 4), (2, 4), "sequence")
    assert marked(tokens, SCATTER) == State((4, 4), (4, 4), "partial")
    padded = State((4, 3), (2, 3), "sequence")  # four tokens over three ranks, padded to six
    assert marked(padded, replace(SCATTER, bytes=72), 3) == State((4, 3), (4, 3), "partial")
    assert mark_partial_sums([replace(BOX, leaves=whole)], 2) == [replace(BOX, leaves=whole)]
