"""A reader on behalf of others: batches, the end and errors as messages, with the random numbers drawn on the way."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lightning_tp.core.ops.rng import local_state
from lightning_tp.data.reader import Message, Reader, adopt_random_states, seeded_alike
from lightning_tp.errors import SecondaryError


def stream() -> Iterator[float]:
    yield 1.0
    yield torch.rand(1).item()
    yield random.random()
    yield np.random.rand()
    raise OSError("no such file")


def test_messages_carry_the_states_that_moved() -> None:
    reader = Reader(stream(), track=True)
    messages = [reader.read() for _ in range(6)]
    assert [m.kind for m in messages] == ["batch"] * 4 + ["error", "end"]
    assert [sorted(m.rng or {}) for m in messages] == [[], ["cpu"], ["python"], ["numpy"], [], []]
    assert messages[4].batch == "OSError: no such file" and isinstance(messages[4].error, OSError)


def test_an_iterator_may_draw_when_it_is_made() -> None:
    class Shuffled:
        def __iter__(self) -> Iterator[int]:
            return iter(torch.randperm(3).tolist())

    reader = Reader(Shuffled(), track=True)
    assert [sorted(reader.read().rng or {}) for _ in range(2)] == [["cpu"], []]


def test_without_track_no_state_is_sent() -> None:
    assert Reader(iter([5]), track=False).read() == Message("batch", 5)


def test_a_stream_that_was_begun_continues() -> None:
    iterator = iter("abc")
    reader = Reader(iterator, track=False, started=(iterator, [next(iterator)]))
    assert [reader.read().batch for _ in range(4)] == ["a", "b", "c", None]


def test_states_are_taken_over() -> None:
    torch.manual_seed(1)
    there, number = {"cpu": torch.get_rng_state()}, torch.rand(1)
    torch.manual_seed(2)
    before = random.getstate()
    adopt_random_states(there)
    assert torch.equal(torch.rand(1), number) and random.getstate() == before
    state = torch.get_rng_state()
    adopt_random_states(None)
    assert torch.equal(torch.get_rng_state(), state)


def test_alike_inside_as_before_outside() -> None:
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        before = local_state()
        with pytest.raises(KeyError), seeded_alike():
            drawn.append((torch.rand(1).item(), random.random(), np.random.rand()))
            raise KeyError
        after = local_state()
        assert torch.equal(before["cpu"], after["cpu"]) and before["python"] == after["python"]
        assert torch.equal(before["numpy"][1], after["numpy"][1]) and before["numpy"][2:] == after["numpy"][2:]
    assert drawn[0] == drawn[1]


def test_an_error_is_raised_where_it_was_and_named_elsewhere() -> None:
    message = Message("error", "OSError: no such file", error=OSError("no such file"))
    with pytest.raises(OSError, match="no such file"):
        message.or_raise()
    with pytest.raises(SecondaryError, match="first rank of this tensor-parallel group: OSError: no such file"):
        message._replace(error=None).or_raise()
    batch = Message("batch", 1)
    assert batch.or_raise() is batch
