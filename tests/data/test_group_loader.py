"""Loaders under a mesh: every batch equal inside a tensor-parallel group, each item once over the data-parallel axis, no hang."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from lightning_tp import TPError
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.core.ops.rng import seed_mesh
from lightning_tp.data.group_loader import GroupLoader, complete_step, share_loader
from lightning_tp.data.reader import Message
from lightning_tp.data.transfer import Ranks
from lightning_tp.testing import run_ranks

MESHES = [(1, 2), (2, 2), (2, 1)]


class Stream(IterableDataset):
    """0, 1, 2, ..; workers take turns."""

    def __init__(self, count: int, mix: Callable[[int], list[int]] | None = None) -> None:
        self.count, self.mix = count, mix

    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        items = self.mix(self.count) if self.mix is not None else range(self.count)
        for i in list(items)[info.id if info else 0 :: info.num_workers if info else 1]:
            yield torch.tensor(i)


class ByIndex(Dataset):
    def __init__(self, count: int, change: Callable[[], float] | None = None) -> None:
        self.count, self.change = count, change

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"x": torch.tensor(float(i)) + (self.change() if self.change is not None else 0.0), "name": str(i)}


def numbers(batch: Any) -> list[float]:
    return (batch["x"] if isinstance(batch, dict) else batch).flatten().tolist()


def read(mesh: tuple[int, int], make: Callable[[], Any], *, passes: int = 1, **options: Any) -> list[Any]:
    """For each rank (passes: the numbers of each batch, what was warned of, what torch draws next)."""

    def body() -> tuple[list[list[list[float]]], list[str], list[Any]]:
        m = make_mesh("cpu", *mesh)
        seed_mesh(m)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            loader = share_loader(make(), Ranks(m), **options)
            batches = [[numbers(b) for b in loader] for _ in range(passes)]
        return batches, [str(w.message) for w in said], [torch.rand(1).item(), random.random(), np.random.rand()]

    return run_ranks(body, mesh[0] * mesh[1], timeout=60)


def assert_groups_agree(results: list[Any], tp: int, *, draws: tuple[int, ...] = (0,)) -> list[Any]:
    """Equal inside each group; one of each."""
    for i, (batches, _, rng) in enumerate(results):
        first = results[i - i % tp]
        assert batches == first[0]
        for d in draws:
            assert rng[d] == first[2][d]
    return results[::tp]


def dealt(groups: list[Any], which: int = 0) -> list[list[float]]:
    """The batches of all data-parallel ranks, in the order in which one process would have read them."""
    return [b for step in zip(*(g[0][which] for g in groups), strict=True) for b in step]


mesh_of = pytest.mark.parametrize("mesh", MESHES, ids=["tp2", "2x2", "dp2"])


@mesh_of
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_read_once(mesh: tuple[int, int], workers: int) -> None:
    """Every item once, in the order of one process; again in the second pass."""
    make = lambda: DataLoader(Stream(24), batch_size=3, num_workers=workers)  # noqa: E731
    groups = assert_groups_agree(read(mesh, make, passes=2), mesh[1])
    for which in range(2):
        assert dealt(groups, which) == [b.tolist() for b in make()]
    assert [said for _, said, _ in groups] == [[]] * mesh[0]


@mesh_of
def test_generators_and_iterables(mesh: tuple[int, int]) -> None:
    def generator() -> Iterator[Tensor]:
        return (torch.tensor([float(i)]) for i in range(6))

    class Plain:
        def __iter__(self) -> Iterator[Tensor]:
            return generator()

        def __len__(self) -> int:
            return 6

    assert dealt(assert_groups_agree(read(mesh, generator), mesh[1])) == [[float(i)] for i in range(6)]
    groups = assert_groups_agree(read(mesh, Plain, passes=2), mesh[1])
    assert dealt(groups, 1) == [[float(i)] for i in range(6)]


def shuffled(count: int) -> list[int]:
    order = list(range(count))
    random.shuffle(order)
    return [order[i] for i in torch.randperm(count)]


@mesh_of
def test_a_shuffled_stream_is_dealt_out_too(mesh: tuple[int, int]) -> None:
    """Each rank would draw another order; one order is used, and random streams of a group stay together."""

    def make() -> Any:
        random.seed(os.getpid())
        return DataLoader(Stream(24, shuffled), batch_size=3)

    groups = assert_groups_agree(read(mesh, make, passes=2), mesh[1])
    for which in range(2):
        assert sorted(x for b in dealt(groups, which) for x in b) == list(range(24))
    assert groups[0][0][0] != groups[0][0][1]


@pytest.mark.parametrize("mesh", [(2, 2), (2, 1)])
def test_a_stream_that_takes_its_own_share(mesh: tuple[int, int]) -> None:
    tp = mesh[1]
    make = lambda: DataLoader(Stream(24, lambda n: list(range(dist.get_rank() // tp, n, 2))), batch_size=3)  # noqa: E731
    groups = assert_groups_agree(read(mesh, make), tp)
    assert [g[0][0][0] for g in groups] == [[0, 2, 4], [1, 3, 5]]
    assert sorted(x for b in dealt(groups) for x in b) == list(range(24)) and not groups[0][1]


@pytest.mark.parametrize("mesh", [(1, 2), (2, 2)])
def test_a_share_by_the_global_rank_is_warned_of(mesh: tuple[int, int]) -> None:
    make = lambda: DataLoader(Stream(24, lambda n: list(range(dist.get_rank(), n, dist.get_world_size()))), batch_size=2)  # noqa: E731
    groups = assert_groups_agree(read(mesh, make), mesh[1])
    assert "the shards of the other ranks are never read" in groups[0][1][0]


@pytest.mark.parametrize("mesh", [(2, 2), (2, 1)])
@pytest.mark.parametrize("kind", ["dealt", "shares", "by index"])
def test_uneven_ends(mesh: tuple[int, int], kind: str) -> None:
    """Equally many steps, and a warning of what is dropped."""
    tp = mesh[1]

    def make() -> Any:
        dp_rank = dist.get_rank() // tp
        if kind == "dealt":
            return DataLoader(Stream(10), batch_size=2)
        if kind == "shares":
            return DataLoader(Stream(10, lambda n: list(range(n)) if dp_rank else list(range(n, 2 * n - 4))), batch_size=2)
        return DataLoader(ByIndex(10 if dp_rank else 6), batch_size=2)

    groups = assert_groups_agree(read(mesh, make), tp)
    steps = {"dealt": 2, "shares": 3, "by index": 3}[kind]
    assert [len(g[0][0]) for g in groups] == [steps, steps]
    assert len(groups[0][1]) == 1 and "dropped" in groups[0][1][0]


@pytest.mark.parametrize("mesh", [(2, 2), (2, 1)])
@pytest.mark.parametrize("kind", ["dealt", "shares", "by index", "generator"])
@pytest.mark.parametrize("limit", [1.0, 4])
def test_predict_leaves_nothing_out(mesh: tuple[int, int], kind: str, limit: float) -> None:
    """Each rank runs as many steps as the longest, some of them dummies."""
    tp = mesh[1]

    def body() -> tuple[list[list[float]], int, int]:
        m = make_mesh("cpu", *mesh)
        dp_rank = dist.get_rank() // tp
        loader: Any = {
            "dealt": lambda: DataLoader(Stream(10), batch_size=2),
            "shares": lambda: DataLoader(Stream(10, lambda n: list(range(2 * n)) if dp_rank else [100, 101, 102])),
            "by index": lambda: DataLoader(ByIndex(10 if dp_rank else 3)),
            "generator": lambda: (torch.tensor([float(i)]) for i in range(5)),
        }[kind]()
        dummies = []
        shared = share_loader(loader, Ranks(m), dummy_step=lambda loader, batch, index: dummies.append(index), limit=limit)
        found, it = [], iter(shared)
        try:
            most: float = len(shared)
        except TypeError:
            most = float("inf")
        while len(found) < min(most, limit if isinstance(limit, int) else most):  # as Lightning's loop asks
            try:
                found.append(numbers(next(it)))
            except StopIteration:
                break
        return found, len(found) + len(dummies), most

    ranks = run_ranks(body, mesh[0] * tp, timeout=60)
    assert len({steps for _, steps, _ in ranks}) == 1
    found = [x for rank in ranks[::tp] for b in rank[0] for x in b]
    if limit == 1.0:
        items = {"dealt": 10, "shares": 23, "by index": 13, "generator": 5}[kind]
        assert len(found) == items
    assert [r[0] for r in ranks[::tp]] == [r[0] for r in ranks[tp - 1 :: tp]]


def by_pid() -> float:
    return os.getpid() / 7


@pytest.mark.parametrize("mesh", [(1, 2), (2, 2)])
@pytest.mark.parametrize("workers", [0, 2])
def test_random_augmentation(mesh: tuple[int, int], workers: int) -> None:
    """Seeded alike: every rank reads, and nothing is said. Not: the first rank of each group reads for all of it."""
    make = lambda: DataLoader(ByIndex(8, lambda: torch.rand(1).item()), batch_size=2, num_workers=workers)  # noqa: E731
    assert not any(said for _, said, _ in assert_groups_agree(read(mesh, make, passes=2), mesh[1]))

    make = lambda: DataLoader(ByIndex(8, by_pid), batch_size=2, num_workers=workers)  # noqa: E731
    groups = assert_groups_agree(read(mesh, make, passes=2), mesh[1])
    assert len(groups[0][1]) == 1 and "batch 0 differs inside a tensor-parallel group" in groups[0][1][0]

    def drawn() -> float:  # other streams on each rank, which are drawn from as long as both read
        return random.random() + float(np.random.rand()) + torch.rand(1).item()

    def unseeded() -> Any:
        random.seed(os.getpid())
        np.random.seed(os.getpid() % 1000)
        return DataLoader(ByIndex(8, drawn), batch_size=2, num_workers=workers)

    assert_groups_agree(read(mesh, unseeded, passes=2), mesh[1], draws=(0,) if workers else (0, 1, 2))


def test_a_difference_that_comes_late() -> None:
    """Far behind the first batches, in one rank's data only, and in length."""

    class Late(ByIndex):
        def __getitem__(self, i: int) -> dict[str, Any]:
            item = super().__getitem__(i)
            return {**item, "x": item["x"] + (dist.get_rank() if i >= 12 else 0)}

    noisy = lambda: DataLoader(Late(20, lambda: torch.rand(1).item()), batch_size=2)  # noqa: E731
    groups = assert_groups_agree(read((1, 2), noisy), 2)  # what the first rank draws alone, the others take over
    assert "batch 6 differs" in groups[0][1][0]

    class Unsized:
        def __iter__(self) -> Iterator[list[int]]:
            return iter([[0], [1], [2], [3], [4]][: 5 - dist.get_rank()])

    groups = assert_groups_agree(read((1, 2), lambda: DataLoader(ByIndex(20), batch_sampler=Unsized())), 2)
    assert [b for b in groups[0][0][0]] == [[0], [1], [2], [3], [4]]


def test_a_batch_sampler_that_nobody_seeded() -> None:
    class Mixed:
        def __iter__(self) -> Iterator[list[int]]:
            order = shuffled(8)
            return iter([order[:3], order[3:6], order[6:]])

        def __len__(self) -> int:
            return 3

    def make() -> Any:
        random.seed(os.getpid())
        return DataLoader(ByIndex(8), batch_sampler=Mixed())

    groups = assert_groups_agree(read((1, 2), make, passes=2), 2)
    for which in range(2):
        assert sorted(x for b in groups[0][0][which] for x in b) == list(range(8))


def test_looks_like_the_loader() -> None:
    def body() -> None:
        inner = DataLoader(ByIndex(8), batch_size=2)
        loader = share_loader(inner, Ranks(make_mesh("cpu", 1, 2)))
        assert isinstance(loader, DataLoader) and len(loader) == 4
        assert loader.dataset is inner.dataset and loader.sampler is inner.sampler and not hasattr(loader, "state_dict")
        with pytest.raises(TypeError):
            len(share_loader(DataLoader(Stream(3)), Ranks(make_mesh("cpu", 1, 2))))

        class Placed(DataLoader):
            def state_dict(self) -> dict[str, int]:
                return {"at": 3}

            def load_state_dict(self, state: dict[str, int]) -> None:
                self.at = state["at"]

        loader = share_loader(Placed(ByIndex(8)), Ranks(make_mesh("cpu", 1, 2)))
        loader.load_state_dict(loader.state_dict())
        assert loader.at == 3 and all(hasattr(type(loader), name) for name in ("state_dict", "load_state_dict"))  # for isinstance

    run_ranks(body, 2)


def test_alone_it_is_the_loader_itself() -> None:
    def body() -> None:
        loader = DataLoader(ByIndex(8))
        assert share_loader(loader, Ranks(make_mesh("cpu", 1, 1))) is loader

    run_ranks(body, 1)


@pytest.mark.parametrize("broken", [(0, 1), (0,), (1,)])
def test_an_error_while_reading_by_index(broken: tuple[int, ...]) -> None:
    """On all ranks of a group, or on one, whichever: it is raised there, and the others end with its words."""

    class Broken(ByIndex):
        def __getitem__(self, i: int) -> dict[str, Any]:
            if i == 5 and dist.get_rank() in broken:
                raise OSError("no such file")
            return super().__getitem__(i)

    def body() -> str:
        try:
            list(share_loader(DataLoader(Broken(8)), Ranks(make_mesh("cpu", 1, 2))))
        except (OSError, TPError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    for rank, said in enumerate(run_ranks(body, 2)):
        assert said.startswith("OSError" if rank in broken else "SecondaryError") and "no such file" in said, said


def test_a_step_is_complete_or_the_same_for_all() -> None:
    """What rank 0 has read for each data-parallel rank, and what each is told."""
    a, b, c, end = *(Message("batch", x) for x in "abc"), Message("end")
    error = Message("error", "no such file")
    for pad in (False, True):
        assert complete_step([a, b, c], pad=pad) == [a, b, c]
        assert complete_step([end, end, end], pad=pad) == [end, end, end]
        assert complete_step([a, error, end], pad=pad) == [error, error, error]
    assert complete_step([a, b, end], pad=False) == [Message("dropped", last=True)] * 3
    full = [(m.kind, m.batch, m.last) for m in complete_step([a, b, end], pad=True)]
    assert full == [("batch", "a", True), ("batch", "b", True), ("dummy", "b", True)]


def test_a_rank_without_any_batch_is_an_error_in_predict() -> None:
    def body() -> str:
        ranks = Ranks(make_mesh("cpu", 2, 1))
        count = 3 * ranks.dp_rank  # a shard of a stream: nothing on the first rank
        loader = share_loader((i for i in range(count)), ranks, dummy_step=lambda *step: None, where="`predict`")
        try:
            next(iter(loader))
        except TPError as error:
            return str(error)
        return ""

    first, second = run_ranks(body, 2)
    assert first.startswith("`predict`: data-parallel rank 0 has no batch at all") and not second


@pytest.mark.parametrize(
    ("limit", "size", "steps"), [(3, None, 3), (3, 10, 3), (10, 3, 3), (0, 3, 0), (1.0, None, None), (1.0, 7, 7), (0.5, 7, 3)]
)
def test_steps_are_limited_by_a_number_or_a_share_of_the_batches(limit: float, size: int | None, steps: int | None) -> None:
    ranks: Any = None
    loader = GroupLoader([], ranks, None, limit, "the loader")
    loader.size = size
    assert loader.max_steps == steps
