from __future__ import annotations

import sys
from typing import Any

from lightning_tp.core.modules.call_site import call_site


def test_places_do_not_depend_on_how_often_code_ran() -> None:
    found = []

    def here() -> Any:
        return call_site(sys._getframe())

    def caller() -> Any:
        return tuple(here() for _ in range(1))

    for _ in range(64):
        found.append(caller())
    assert len(set(found)) == 1


def test_two_places_in_one_line_differ() -> None:
    def here() -> Any:
        return call_site(sys._getframe())

    a, b = here(), here()
    assert a != b
