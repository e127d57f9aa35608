"""A loader that resumes at the position of another one yields what that one would have yielded."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from lightning_tp.core.ops.rng import local_state, set_local_state
from lightning_tp.data.resume import ResumableLoader


class Noisy(Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[int, float, float, float]:
        return i, float(torch.rand(())), random.random(), float(numpy.random.rand())


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(range(100, 112))


def rows(batches: Any) -> list[Any]:
    return [[t.tolist() for t in batch] if isinstance(batch, list) else batch.tolist() for batch in batches]


def interrupted(make: Any, taken: int, passes: int = 0) -> tuple[list[Any], list[Any]]:
    """What is left after `taken` batches of a pass, and what another loader yields that resumes there; with the pass after it."""
    torch.manual_seed(0)
    loader = ResumableLoader(make())
    for _ in range(passes):
        rows(loader)
    torch.rand(7)
    batches = iter(loader)
    for _ in range(taken):
        next(batches)
        torch.rand(3)  # of a step
    position, states = loader.position(), local_state()
    left = rows(batches) + rows(loader)

    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)
    again = ResumableLoader(make(), resume=position, then=lambda: set_local_state(states))
    return left, rows(again) + rows(again)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("taken", [2, 6])
@pytest.mark.parametrize("own", [False, True])
def test_random_order_and_random_items(workers: int, taken: int, own: bool) -> None:
    def make() -> DataLoader:
        generator = torch.Generator().manual_seed(3) if own else None
        return DataLoader(Noisy(), batch_size=2, shuffle=True, num_workers=workers, generator=generator)

    left, got = interrupted(make, taken, passes=1)
    assert got == left and len(got) == 6 - taken + 6


def test_a_stream() -> None:
    left, got = interrupted(lambda: DataLoader(Stream(), batch_size=2), 4)
    assert got == left and got[0] == [108, 109]


def test_a_pass_that_is_over() -> None:
    """The next one is the next one of the loader's own generator."""

    def make() -> DataLoader:
        return DataLoader(range(12), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(3))

    loader = ResumableLoader(make())
    rows(loader)
    position = loader.position()
    assert rows(ResumableLoader(make(), resume=position, finished=True)) == rows(loader)


def test_the_seed_of_a_sampler_goes_on() -> None:
    def make(seed: int) -> DataLoader:
        return DataLoader(range(12), sampler=DistributedSampler(range(12), 2, 1, seed=seed))

    loader = ResumableLoader(make(7))
    batches = iter(loader)
    next(batches)
    assert rows(ResumableLoader(make(8), resume=loader.position())) == rows(batches)


def test_it_is_seen_through() -> None:
    loader = ResumableLoader(DataLoader(range(12), batch_size=2))
    assert isinstance(loader, DataLoader) and len(loader) == 6 and loader.batch_size == 2 and loader.state_dict() == {}


def test_batches_that_were_prefetched_are_not_read_yet() -> None:
    loader = ResumableLoader(DataLoader(range(12), batch_size=2))
    batches = iter(loader)
    _ = next(batches), next(batches), next(batches)
    assert [loader.position(prefetched)["read"] for prefetched in (0, 2)] == [3, 1]
    left = rows(ResumableLoader(DataLoader(range(12), batch_size=2), resume=loader.position(prefetched=2)))
    assert left == rows(DataLoader(range(12), batch_size=2))[1:]


def test_batches_that_are_skipped_leave_the_random_states_alone() -> None:
    loader = ResumableLoader(DataLoader(Noisy(), batch_size=2))
    batches = iter(loader)
    _ = next(batches), next(batches), next(batches)
    position = loader.position()
    states: list[dict[str, Any]] = []
    torch.manual_seed(5)
    before = local_state()
    again = ResumableLoader(DataLoader(Noisy(), batch_size=2), resume=position, then=lambda: states.append(local_state()))
    next(iter(again))
    assert len(states) == 1 and torch.equal(states[0]["cpu"], before["cpu"]) and states[0]["python"] == before["python"]
