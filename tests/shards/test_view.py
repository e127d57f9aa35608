"""Views of sharded tensors: nested, and left in any case."""

from __future__ import annotations

import pytest

from lightning_tp.shards.view import depth, enter_backward, full_view, leave_backward, local_view


def test_views_are_nested() -> None:
    assert depth() == 0
    with local_view():
        with full_view():
            assert depth() == -1
            with local_view():
                assert depth() == 1
        assert depth() == 1
    assert depth() == 0


def test_a_decorated_function_leaves_the_view_when_it_raises() -> None:
    seen: list[int] = []

    @local_view()
    def fail(times: int) -> None:
        seen.append(depth())
        if times:
            fail(times - 1)
        raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            fail(1)
    assert seen == [1, 2, 1, 2] and depth() == 0


def test_backward_passes_that_overlap_leave_the_view_together() -> None:
    enter_backward()
    assert depth() == 1
    with full_view():
        enter_backward()  # of another model
        assert depth() == -1
    leave_backward()
    assert depth() == 1
    leave_backward()
    assert depth() == 0
    with local_view():
        enter_backward()
        leave_backward()
        assert depth() == 1
