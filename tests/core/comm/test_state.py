"""States of a tensor on the axis: names, gradients, what is none."""

from __future__ import annotations

import json

import pytest

from lightning_tp.core.comm.state import SEQUENCE, WIDTH, I, P, R, S, State
from lightning_tp.errors import TPError

ALL = (R, I, P, SEQUENCE, WIDTH, S(0))


@pytest.mark.parametrize("state", ALL, ids=str)
def test_a_state_is_its_name(state: State) -> None:
    assert State.of(str(state)) == State.of(json.loads(json.dumps(str(state)))) == State.of(state) == state
    assert len({state, State.of(str(state))}) == 1


def test_names() -> None:
    assert [str(s) for s in ALL] == ["R", "I", "P", "S(1)", "S(-1)", "S(0)"]
    assert [s.dim for s in ALL] == [None, None, None, 1, -1, 0]
    assert [s.is_full for s in ALL] == [True, True, False, False, False, False]


def test_the_gradient_of_the_gradient_is_in_the_state_of_the_tensor() -> None:
    assert [s.gradient for s in ALL] == [P, I, R, SEQUENCE, WIDTH, S(0)]
    assert all(s.gradient.gradient == s for s in ALL)


@pytest.mark.parametrize("value", ["r", "S", "S(x)", "S(1", "sequence", "", None, 1, ["R"], "V"])
def test_what_is_no_state(value: object) -> None:
    with pytest.raises(TPError, match=r"is not a state of a tensor.*'R'.*'I'.*'P'.*'S\(1\)'.*'S\(-1\)'"):
        State.of(value)
