"""Views of sharded tensors: nested, and left in any case."""

from __future__ import annotations

import pytest

from lightning_tp.shards.view import depth, full_view, local_view


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
