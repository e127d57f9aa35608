"""Objects that code has changed are as they were before it ran."""

from __future__ import annotations

import itertools
import logging
import random
import sys
import threading
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_tp.core.modules.objects import preserve_objects


class Slotted:
    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0


class Frozen(OrderedDict):  # type: ignore[type-arg]
    def update(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("as Hugging Face's outputs")


def test_all_that_is_reached() -> None:
    counts = {"in a closure": 0}

    def count() -> None:
        counts["in a closure"] += 1

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self.inner.count = count
            self.partial = partial(lambda x: x, [1, 2])
            self.slotted, self.plain, self.queue, self.seen = Slotted(), [{"a": (deque([1]),)}], deque([1, 2]), {1}
            self.cache, self.array, self.outputs = torch.zeros(3), np.zeros(3), Frozen(a=1)
            self.own = random.Random(1), np.random.default_rng(2), torch.Generator().manual_seed(3), np.random.RandomState(4)

        def change(self) -> list[float]:
            self.inner.count()
            self.partial.args[0].append(3)
            self.slotted.n += 1
            self.plain[0]["a"][0].append(2)
            self.queue.popleft()
            self.seen.add(2)
            self.cache += 1
            self.array += 1
            self.outputs["b"] = 2
            self.new = 1
            generated = [g.random() for g in self.own[:2]] + [float(torch.rand((), generator=self.own[2])), self.own[3].rand()]
            return [*generated, random.random(), float(np.random.rand()), float(torch.rand(()))]

    net = Net()
    with preserve_objects([net]):
        drawn = net.change()
    assert counts == {"in a closure": 0} and net.partial.args[0] == [1, 2] and net.slotted.n == 0
    assert net.plain[0]["a"][0] == deque([1]) and net.queue == deque([1, 2]) and net.seen == {1}
    assert not net.cache.any() and not net.array.any() and dict(net.outputs) == {"a": 1} and not hasattr(net, "new")
    assert net.change() == drawn  # the generators, too


def test_iterators_go_back_and_lose_nothing() -> None:
    net = nn.Module()
    net.numbers, net.more = iter([1, 2, 3]), [(n * n for n in itertools.count(2))]
    for _ in range(2):
        with preserve_objects([net]):
            assert [next(net.numbers), next(net.numbers), next(net.more[0])] == [1, 2, 4]
    assert list(net.numbers) == [1, 2, 3] and [next(net.more[0]) for _ in range(3)] == [4, 9, 16]


def test_they_are_restored_after_an_error_and_others_are_left_alone() -> None:
    net, apart = nn.Module(), {"n": 0}
    net.apart, net.own = apart, {"n": 0}
    with pytest.raises(ZeroDivisionError), preserve_objects([net], without=[apart]):
        net.apart["n"] += 1
        net.own["n"] += 1
        1 / 0  # noqa: B018
    assert apart == {"n": 1} and net.own == {"n": 0}


def test_what_leads_to_the_process_is_not_looked_into(capsys: pytest.CaptureFixture[str]) -> None:
    """A notebook's streams and loggers lead to its shell and its sockets."""
    net = nn.Module()
    net.log, net.out, net.lock, net.pool = logging.getLogger("here"), sys.stdout, threading.Condition(), ThreadPoolExecutor(1)
    net.log.kept = {"n": 0}  # type: ignore[attr-defined]
    with preserve_objects([net]):
        net.log.kept["n"] += 1  # type: ignore[attr-defined]
        print("said", file=net.out)
        assert net.pool.submit(lambda: 1).result() == 1
    assert net.log.kept == {"n": 1} and net.pool.submit(lambda: 2).result() == 2 and capsys.readouterr().out == "said\n"  # type: ignore[attr-defined]
    net.pool.shutdown()


def test_frozen_slots_are_restored() -> None:
    @dataclass(frozen=True)
    class Point:
        __slots__ = ("at",)
        at: list[int]

    net = nn.Module()
    net.point = point = Point([1])
    with preserve_objects([net]):
        object.__setattr__(point, "at", [2])
        point.at.append(3)
    assert point.at == [1]
