"""Workers that torchrun has started agree on which start it is, before they make their process group.

torchrun lends its workers the store of its own rendezvous, which lives on when it starts them again: after a restart on several nodes they
would read the addresses of processes that are gone ("Connection refused"). Here the first rank asks who is there, by names that are drawn
anew in each start, until all have answered one and the same question; what follows is kept under its name in the store.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist

from lightning_tp._compat import patched
from lightning_tp.errors import TPError

PERIOD = 0.05  # seconds between two looks


@contextmanager
def agree_on_start(rank: int, world: int, timeout: timedelta | None) -> Iterator[None]:
    """While this lasts, the process group of torchrun's workers is made under a name that all of this start share, and no other does.

    Raises:
        TPError: if not all ranks have come in time; it names those that have not.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        yield
        return
    wait = timeout or timedelta(minutes=30)
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None, False, wait)
    name = agreed_store(dist.PrefixStore("lightning_tp/meeting", store), rank, world, wait)
    init = partial(dist.init_process_group, store=dist.PrefixStore(f"lightning_tp/{name}", store))
    undo = patched(dist, "init_process_group", init)
    try:
        yield
    finally:
        undo()


def agreed_store(store: Any, rank: int, world: int, timeout: timedelta) -> str:
    """A name that all ranks of this start agree on. What earlier starts have left in the store does no harm.

    Args:
        store: of `torch.distributed`, shared by all.
        rank: of this process.
        world: how many there are.
        timeout: to wait for them.

    Raises:
        TPError: if some have not come by then.
    """
    until = time.monotonic() + timeout.total_seconds()
    mine = uuid.uuid4().hex
    store.set(f"here/{rank}", mine)
    return _call(store, world, until) if rank == 0 else _answer(store, rank, mine, until)


def _call(store: Any, world: int, until: float) -> str:
    """Rank 0: ask those who are there, and anew if one of them turns out to be another, until all have answered."""
    called: list[str] = []
    while True:
        here = [_get(store, f"here/{r}") for r in range(world)]
        if None not in here and here != called:
            called = [str(name) for name in here]
            store.set("call", json.dumps(called))
        if called and all(_get(store, f"answer/{r}") == json.dumps(called) for r in range(1, world)):
            store.set("go", json.dumps(called))
            return called[0]  # drawn anew in each start
        _wait(
            until,
            [r for r in range(world) if here[r] is None or (called and r and _get(store, f"answer/{r}") != json.dumps(called))],
        )


def _answer(store: Any, rank: int, mine: str, until: float) -> str:
    answered = None
    while True:
        call = _get(store, "call")
        if call is not None and call != answered and json.loads(call)[rank : rank + 1] == [mine]:
            answered = call
            store.set(f"answer/{rank}", call)
        if answered is not None and _get(store, "go") == answered:
            return str(json.loads(answered)[0])
        _wait(until, [0] if answered is None else [])


def _get(store: Any, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None


def _wait(until: float, missing: list[int]) -> None:
    if time.monotonic() > until:
        who = f"rank(s) {', '.join(map(str, missing[:8]))} did not come" if missing else "not all ranks came"
        raise TPError(
            f"torchrun has started this worker, and {who} in time. Look at what their nodes say, or give `TPStrategy(timeout=..)` more."
        )
    time.sleep(PERIOD)
