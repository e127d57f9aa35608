"""Random generators of user objects: found where they are held, saved, restored, set alike in a group."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist

from lightning_tp.core.ops.generators import RandomStates, generators_in, get_state, is_generator, random_states_restored, set_state
from lightning_tp.testing import run_ranks

GLOBAL = random.Random(0)


class Holder:
    shared = numpy.random.RandomState(0)

    def __init__(self) -> None:
        self.own = random.Random(1)

    def draw(self) -> float:
        return GLOBAL.random()


def closure() -> Callable[[], float]:
    inner = numpy.random.default_rng(3)
    return lambda: float(inner.random())


HELD: dict[str, tuple[Any, list[str]]] = {
    "attribute, class, global": (Holder(), ["x.own", "x:Holder.shared", "x:Holder.draw>GLOBAL"]),
    "containers": ({"a": [(torch.Generator(),)]}, ["x['a'][0][0]"]),
    "closure": (closure(), ["x<inner>"]),
    "bound method in a partial": (
        partial(Holder().draw),
        ["x.func.__self__.own", "x.func.__self__:Holder.shared", "x.func.__func__>GLOBAL"],
    ),
    "default": (lambda r=GLOBAL: r.random(), ["x.__defaults__[0]"]),
    "none": ([random.random, torch.default_generator, random.SystemRandom(), "text", 3, torch.ones(2)], []),
}


@pytest.mark.parametrize("kind", HELD)
def test_where_generators_are_found(kind: str) -> None:
    value, paths = HELD[kind]
    assert sorted(generators_in({"x": value})) == sorted(paths)


def test_objects_that_hold_each_other_are_walked_once() -> None:
    a = SimpleNamespace(r=random.Random(0))
    a.me, a.list = a, [a]
    assert list(generators_in({"a": a})) == ["a.r"]


GENERATORS: dict[str, Callable[[int], Any]] = {
    "python": random.Random,
    "torch": lambda seed: torch.Generator().manual_seed(seed),
    "numpy": numpy.random.default_rng,
    "numpy, old": numpy.random.RandomState,
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_states_are_set_and_hashed(kind: str) -> None:
    a, b = (GENERATORS[kind](seed) for seed in (1, 2))
    assert is_generator(a)
    one, two = RandomStates({"g": [a]}), RandomStates({"g": [b]})
    assert one.hash() != two.hash()
    set_state(b, get_state(a))
    assert one.hash() == two.hash()


@pytest.mark.parametrize(
    "draw", [random.random, numpy.random.rand, lambda: torch.rand(1), GLOBAL.random], ids=["python", "numpy", "torch", "own"]
)
def test_every_draw_shows_and_is_undone(draw: Callable[[], Any]) -> None:
    states = RandomStates({"g": GLOBAL})
    before = states.hash()
    with random_states_restored({"g": GLOBAL}):
        draw()
        assert states.hash() != before
    assert states.hash() == before


def test_a_group_takes_over_the_states_of_its_first_rank() -> None:
    def body() -> tuple[float, float, float, int]:
        rank = dist.get_rank()
        own = random.Random(rank)
        for seed in (random.seed, numpy.random.seed, torch.manual_seed):
            seed(rank)
        states = RandomStates({"only": random.Random(0), "own": own} if rank else {"own": own})
        states.take_over(dist.group.WORLD)
        return own.random(), random.random(), float(numpy.random.rand()), int(torch.randint(10**9, ()))

    first, second = run_ranks(body, 2)
    assert first == second and first[0] == random.Random(0).random()
