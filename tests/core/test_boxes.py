"""Boxes of tensors against torch's own indexing."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import lightning_tp as ltp
from lightning_tp.core.boxes import Box, assemble, box_of_view, full_box, narrow, overlap, relative

FULL = torch.arange(60).view(5, 4, 3)


def test_a_box_is_a_slice() -> None:
    box = Box((1, 0, 2), (3, 4, 1))
    assert torch.equal(narrow(FULL, box), FULL[1:4, :, 2:3]) and box.numel == 12
    assert torch.equal(narrow(FULL, full_box((5, 4, 3))), FULL)
    assert narrow(torch.tensor(7), full_box(())).item() == 7 and full_box(()).numel == 1


def test_overlaps_in_all_positions() -> None:
    """Of all pairs of ranges of 5: the common elements, and where they are in the first one."""
    ranges = [(i, n) for i in range(5) for n in range(1, 6 - i)]
    for (i, n), (j, m) in itertools.product(ranges, ranges):
        a, b = Box((i,), (n,)), Box((j,), (m,))
        both = overlap(a, b)
        common = sorted(set(range(i, i + n)) & set(range(j, j + m)))
        assert (both is None) == (not common)
        if both is not None:
            inside = torch.arange(i, i + n)[relative(both, a).offset[0] :][: both.size[0]]
            assert inside.tolist() == common


def test_pieces_are_put_together() -> None:
    boxes = [Box((0, 0), (2, 3)), Box((2, 0), (3, 1)), Box((2, 1), (3, 2))]
    full = torch.arange(15.0).view(5, 3)
    read: list[Box] = []

    def reader(piece: Box) -> tuple[Box, object]:
        def load(inner: Box) -> Tensor:
            read.append(piece)
            return narrow(narrow(full, piece), inner)

        return piece, load

    pieces = [reader(box) for box in boxes]
    for offset, size in (((0, 0), (5, 3)), ((1, 1), (3, 2)), ((2, 1), (1, 1)), ((0, 0), (0, 3))):
        box = Box(offset, size)
        got = assemble(box, pieces, torch.float64, "w")
        assert torch.equal(got, narrow(full, box).double()) and got.is_contiguous()
    read.clear()
    assemble(Box((3, 1), (2, 1)), pieces, torch.float32, "w")
    assert read == boxes[2:], "only the pieces that have some of it are read"
    with pytest.raises(ltp.TPError, match=r"w: only 12 of 15 elements are stored\. The checkpoint is not complete"):
        assemble(full_box((5, 3)), [pieces[0], pieces[2]], torch.float32, "w")
    assert assemble(full_box(()), [(full_box(()), lambda inner: torch.tensor(3))], torch.int64, "s").item() == 3


def test_views_are_boxes_or_none() -> None:
    for box in (Box((1, 0, 2), (3, 4, 1)), Box((0, 3, 0), (1, 1, 3)), full_box((5, 4, 3))):
        view = narrow(FULL, box)
        assert box_of_view(view, FULL) == box and box_of_view(view.squeeze(), FULL) == box
    assert box_of_view(FULL.transpose(0, 1), FULL) is None
    assert box_of_view(FULL[::2], FULL) is None
    assert box_of_view(FULL.view(20, 3), FULL) is None
