from __future__ import annotations

import json

import pytest

from lightning_tp.core.comm.state import P
from lightning_tp.styles import RewrittenCalls
from lightning_tp.styles.calls.call import Call, Operand, call_from
from lightning_tp.styles.split import Ownership

HALVES = Ownership(((0, 2), (1, 2)))
CALLS = [
    Call("view", (("forward", "1:2-3:4"),), sizes=(((0, 1, 2),), ((0, 1, 2), (1, 3, 0)))),
    Call("__mul__", (), operands=(Operand((1,), (1, HALVES), True, (0,)), Operand(("other", 0), None, True))),
    Call("addmm", (), leave=True, to=P),
    Call("split", (), pieces=((1, 3), (2, 2))),
    Call("__getitem__", (), items=((1, 0, 4, 1, 8), (1, 4, 8, 1, 8))),
    Call("conv1d", (), groups=(2, 1)),
    Call("linear", (), logits=301),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda c: c.name)
def test_json_keeps_a_call(call: Call) -> None:
    plain = RewrittenCalls((call,)).options()["calls"][0]
    again = call_from(json.loads(json.dumps(plain)))
    assert again == call
    assert hash(again) == hash(call)
    assert again.changes


def test_a_call_in_which_nothing_changes() -> None:
    assert not Call("view", (("forward", "1:2-3:4"),)).changes
