from __future__ import annotations

import torch

from lightning_tp.infer.calls.recorded_call import tensors_given
from tests.infer.calls.recorded import halves, recorded

A, B = torch.zeros(2, 8), torch.zeros(8)


def test_where_the_tensors_of_a_call_stand() -> None:
    found = tensors_given((A, [1, B], None), {"mask": B, "more": (A, A), "n": 3})
    assert [path for path, _ in found] == [(0,), (1, 1), ("mask",), ("more", 0), ("more", 1)]
    assert found[1][1] is B


def test_a_call_is_involved_if_anything_sharded_or_partial_takes_part() -> None:
    assert not recorded(torch.mul, A, B).is_involved
    assert recorded(torch.mul, A, B, layouts={0: halves(1)}).is_involved
    assert recorded(torch.mul, A, B, results=halves(1)).is_involved
    assert recorded(torch.mul, A, B, products=(("in", "w"),)).is_involved
    assert not recorded(torch.mul, A, B, products=(("out", "w"),)).is_involved
    assert recorded(torch.mul, A, B, vocabulary=8).is_involved
    assert not recorded(torch.mul, A, B, partial_results=True).is_involved
    assert recorded(torch.mul, A, B, partial_results=True, equal=(1,)).is_involved


def test_an_argument_by_its_position_or_its_name() -> None:
    call = recorded(torch.split, A, 4, kwargs={"dim": 1})
    assert (call.argument(1, "split_size"), call.argument(2, "dim"), call.argument(3, "other", "none")) == (4, 1, "none")


def test_the_call_as_it_is() -> None:
    call = recorded(torch.mul, A, B)
    assert (call.unchanged.name, call.unchanged.at) == ("mul", call.site) and not call.unchanged.changes
