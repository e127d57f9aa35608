"""Workers of one start find each other, whatever earlier starts have left in the store."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

import lightning_tp as ltp
from lightning_tp.trainer.launch.rendezvous import agreed_store

SOON = timedelta(seconds=20)


def start(store: Any, ranks: range, world: int, found: dict[int, str]) -> list[threading.Thread]:
    threads = [threading.Thread(target=lambda r=r: found.update({r: agreed_store(store, r, world, SOON)})) for r in ranks]
    for t in threads:
        t.start()
    return threads


def test_each_start_has_a_name_of_its_own() -> None:
    """Also of fewer ranks, and where some come late: they are not taken for those that were there before."""
    store = dist.HashStore()
    names = []
    for world, late in ((4, 0), (4, 3), (2, 1), (1, 0), (4, 2)):
        found: dict[int, str] = {}
        first = start(store, range(late, world), world, found)
        time.sleep(0.3)
        assert late == 0 or len(found) == 0
        for t in [*first, *start(store, range(late), world, found)]:
            t.join(20)
        assert sorted(found) == list(range(world)) and len(set(found.values())) == 1
        names.append(found[0])
    assert len(set(names)) == len(names)


def test_those_who_do_not_come_are_named() -> None:
    with pytest.raises(ltp.TPError, match=r"rank\(s\) 1, 2 did not arrive in time"):
        agreed_store(dist.HashStore(), 0, 3, timedelta(seconds=0.2))
    with pytest.raises(ltp.TPError, match=r"rank\(s\) 0 did not arrive in time"):
        agreed_store(dist.HashStore(), 1, 3, timedelta(seconds=0.2))
