"""Let workers that torchrun has restarted agree on which start they belong to, before they make their process group.

torchrun lends its workers the store of its own rendezvous, which survives a restart: on several nodes the new workers would read the addresses of
processes that are gone ("Connection refused"). Here rank 0 asks who is there, by names that are drawn anew in each start, until all have answered
the same question; the process group is then made under the name of that start.
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

from lightning_tp.errors import TPError
from lightning_tp.trainer.patches.replaced import replaced

PERIOD = 0.05  # seconds between two looks at the store


@contextmanager
def agree_on_start(rank: int, world: int, timeout: timedelta | None) -> Iterator[None]:
    """While this lasts, make the process group of torchrun's workers under a name that all ranks of this start share, and no other start does.

    Raises:
        TPError: If some ranks do not arrive in time; it names them.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        yield
        return
    wait = timeout or timedelta(minutes=30)
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None, False, wait)
    name = agreed_store(dist.PrefixStore("lightning_tp/rendezvous", store), rank, world, wait)
    prefixed = dist.PrefixStore(f"lightning_tp/{name}", store)
    with replaced(dist, "init_process_group", lambda own: partial(own, store=prefixed)):
        yield


def agreed_store(store: Any, rank: int, world: int, timeout: timedelta) -> str:
    """Agree with all ranks of this start on a name that was never used before, whatever earlier starts have left in the store.

    Raises:
        TPError: If some ranks do not arrive in time.
    """
    until = time.monotonic() + timeout.total_seconds()
    mine = uuid.uuid4().hex
    store.set(f"here/{rank}", mine)
    return _call(store, world, until) if rank == 0 else _answer(store, rank, mine, until)


def _call(store: Any, world: int, until: float) -> str:
    """Rank 0: call those who are there, and call again if one of them turns out to be another process, until all have answered."""
    called: list[str] = []
    while True:
        here = [_get(store, f"here/{r}") for r in range(world)]
        if None not in here and here != called:
            called = [str(name) for name in here]
            store.set("call", json.dumps(called))
        question = json.dumps(called)
        silent = [r for r in range(1, world) if _get(store, f"answer/{r}") != question] if called else []
        if called and not silent:
            store.set("go", question)
            return called[0]  # drawn anew in each start
        _wait(until, sorted({r for r in range(world) if here[r] is None} | set(silent)))


def _answer(store: Any, rank: int, mine: str, until: float) -> str:
    """Another rank: answer each call that has this process in it, until one of them is the last."""
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
        who = f"rank(s) {', '.join(map(str, missing[:8]))} did not arrive" if missing else "not all ranks arrived"
        raise TPError(
            f"torchrun has started this worker, and {who} in time. Look at the logs of their nodes, or raise `TPStrategy(timeout=..)`."
        )
    time.sleep(PERIOD)
