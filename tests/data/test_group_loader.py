"""Loaders under a mesh: every batch equal inside a tensor-parallel group, each item once over the data-parallel axis, no hang."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

import lightning_tp as ltp
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp import TPError
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.core.ops.rng import seed_mesh
from lightning_tp.data.group_loader import Ranks, share_loader
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks

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
    assert "share of the others is never read" in groups[0][1][0]


@pytest.mark.parametrize("mesh", [(2, 2), (2, 1)])
@pytest.mark.parametrize("kind", ["dealt", "shares", "by index"])
def test_uneven_ends(mesh: tuple[int, int], kind: str) -> None:
    """Equally many steps, and a word about what is left out."""
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
    assert len(groups[0][1]) == 1 and "left out" in groups[0][1][0]


@pytest.mark.parametrize("mesh", [(2, 2), (2, 1)])
@pytest.mark.parametrize("kind", ["dealt", "shares", "by index", "generator"])
@pytest.mark.parametrize("limit", [1.0, 4])
def test_predict_leaves_nothing_out(mesh: tuple[int, int], kind: str, limit: float) -> None:
    """Each rank runs as many steps as the longest, some of them for nobody."""
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
        shadows = []
        shared = share_loader(loader, Ranks(m), shadow=lambda loader, batch, index: shadows.append(index), limit=limit)
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
        return found, len(found) + len(shadows), most

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

    groups = assert_groups_agree(read((1, 2), lambda: DataLoader(Late(20), batch_size=2)), 2)
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


def test_batches_arrive_as_they_were() -> None:
    """Dtypes, shapes, containers; odd tensors and other objects; what can't be sent is refused on all ranks."""

    class Words(dict):
        pass

    batch = {
        "bool": torch.tensor([True, False, True]),
        "half": torch.randn(3, 5).bfloat16().t(),
        "scalar": torch.tensor(3),
        "none": torch.empty(0, 4, dtype=torch.int32),
        "pair": (torch.arange(3), "text", None, 2.5),
        "sparse": torch.eye(3).to_sparse(),
        "array": np.arange(3),
    }

    def body() -> Any:
        if dist.get_rank():
            torch.manual_seed(1)
        ranks = Ranks(make_mesh("cpu", 1, 2))
        (found,) = share_loader(iter([batch]), ranks)
        errors = []
        for bad in (lambda: [lambda: 1], lambda: _raise()):
            try:
                list(share_loader(_Lazy(bad), ranks))
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
        return found, errors

    for found, errors in run_ranks(body, 2):
        assert found["array"].tolist() == [0, 1, 2] and found["pair"][1:] == ("text", None, 2.5)
        for name in ("bool", "half", "scalar", "none", "sparse"):
            torch.testing.assert_close(found[name], batch[name], check_stride=False)
        assert "can't be pickled" in errors[0] and "no such file" in errors[1], errors


class _Lazy:
    """Its first batch is fine."""

    def __init__(self, second: Callable[[], Any]) -> None:
        self.second = second

    def __iter__(self) -> Iterator[Any]:
        yield torch.zeros(1)
        yield self.second()


def _raise() -> None:
    raise OSError("no such file")


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
        assert loader.at == 3

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


# ------------------------------------------------------------------------------------------------------- in a Trainer

CONFIG = LlamaConfig(vocab_size=103, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=48, max_seq_len=32)


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = randomize_(Llama(CONFIG), 0)
        self.seen: list[tuple[list[int], float]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())
        self.log("loss", loss, sync_dist=True, on_epoch=True, on_step=False, batch_size=len(batch["tokens"]))
        self.seen.append((batch["tokens"][:, 0].tolist(), loss.item()))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss = F.cross_entropy(self.model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())
        self.log("val", loss, sync_dist=True, batch_size=len(batch["tokens"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-3)


class Iterated(Net):
    """Fetches by itself."""

    def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:  # type: ignore[override]
        batch, batch_idx, _ = next(dataloader_iter)
        return Net.training_step(self, batch, batch_idx)


class Two(Net):
    """Batches of two loaders at a time."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return Net.training_step(self, batch["a"], batch_idx) + Net.training_step(self, batch["b"], batch_idx)


TOKENS = ltp.RandomTokens(24, 8, 103, seed=0)


class TokenStream(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        info = get_worker_info()
        for i in range(info.id if info else 0, 24, info.num_workers if info else 1):
            yield TOKENS[i]


class Augmented(Dataset):
    """Replaces a token at random, by the stream that the caller's kind of reader has."""

    def __init__(self, stream: str) -> None:
        self.stream = stream

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        item = {k: v.clone() for k, v in TOKENS[i].items()}
        draw = {"torch": lambda: int(torch.randint(103, ())), "python": lambda: random.randrange(103)}
        item["tokens"][0] = draw[self.stream]()
        return item


class Pairs:
    """A batch sampler of the user's own: neighbours, in a random order."""

    def __init__(self, seeded: bool) -> None:
        self.seeded = seeded

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(12).tolist() if self.seeded else random.sample(range(12), 12)
        return ([2 * i, 2 * i + 1] for i in order)

    def __len__(self) -> int:
        return 12


def loaders(dp: int) -> dict[str, tuple[type[Net], Callable[[], Any]]]:
    """Data of one process with batches of 4; over `dp` ranks each has its part of a batch."""
    size = 4 // dp
    return {
        "stream": (Net, lambda: DataLoader(TokenStream(), batch_size=size)),
        "stream, workers": (Net, lambda: DataLoader(TokenStream(), batch_size=size, num_workers=2)),
        "generator": (Net, lambda: (b for b in DataLoader(TokenStream(), batch_size=size))),
        "fetched by itself": (Iterated, lambda: DataLoader(TokenStream(), batch_size=size)),
        "two": (
            Two,
            lambda: {"a": DataLoader(TokenStream(), batch_size=size), "b": DataLoader(TokenStream(), batch_size=2 * size)},
        ),
    }


def own_order() -> dict[str, tuple[type[Net], Callable[[], Any]]]:
    """What draws random numbers, in the order of one process, where there is no data-parallel axis."""
    return {
        "shuffled": (Net, lambda: DataLoader(TOKENS, batch_size=4, shuffle=True)),
        "batch sampler": (Net, lambda: DataLoader(TOKENS, batch_sampler=Pairs(True))),
        "augmented": (Net, lambda: DataLoader(Augmented("torch"), batch_size=4, shuffle=True)),
        "augmented by workers": (Net, lambda: DataLoader(Augmented("torch"), batch_size=4, num_workers=2)),
        "python's random, workers": (Net, lambda: DataLoader(Augmented("python"), batch_size=4, num_workers=2)),
    }


def fit(mesh: tuple[int, int] | None, module: Net, loader: Any, **options: Any) -> tuple[Any, ...]:
    """(what each step saw, weights, the logged loss, our warnings)."""
    how: Any = ltp.TPStrategy(tp=mesh[1], plan=PLAN) if mesh else "auto"
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    world = mesh[0] * mesh[1] if mesh else 1
    trainer = L.Trainer(accelerator="cpu", devices=world, strategy=how, **{**quiet, "max_epochs": 2, **options})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(module, *loader) if isinstance(loader, tuple) else trainer.fit(module, loader)
    ours = [str(w.message) for w in said if "a loader of `trainer" in str(w.message)]
    weights = ltp.full_state_dict(module.model) if mesh else module.model.state_dict()
    return module.seen, weights, {k: v.item() for k, v in trainer.callback_metrics.items()}, ours


def in_trainers(mesh: tuple[int, int] | None, cases: Callable[[int], Any], **options: Any) -> list[Any]:
    def body() -> Any:
        found = {}
        for name, (make, loader) in cases(mesh[0] if mesh else 1).items():
            module = make()
            L.seed_everything(3, workers=True, verbose=False)
            found[name] = fit(mesh, module, loader(), **{**options, **({"max_epochs": 1} if name == "generator" else {})})
        return found

    return run_ranks(body, mesh[0] * mesh[1] if mesh else 1, init=False, timeout=150)


_references: dict[str, Any] = {}


@pytest.mark.parametrize("mesh", [pytest.param((1, 2), marks=pytest.mark.slow), (2, 2)], ids=["tp2", "2x2"])
def test_streams_train_as_in_one_process(mesh: tuple[int, int]) -> None:
    (reference,) = in_trainers(None, loaders)
    ranks = in_trainers(mesh, loaders)
    dp, tp = mesh
    for name, (seen, weights, metrics, _) in reference.items():
        steps = zip(*(r[name][0] for r in ranks[::tp]), strict=True)
        items = [[x for items, _ in step for x in items] for step in steps]
        assert all(found[name][3] == [] for found in ranks), name
        if name == "stream, workers" and dp > 1:  # two workers make other batches of half the size
            assert len(items) == len(seen) and sorted(x for step in items for x in step) == sorted(
                x for step, _ in seen for x in step
            )
            continue
        assert items == [items for items, _ in seen], name
        for found in ranks:
            assert_trees_close(found[name][1], weights, rtol=1e-4, name=name)
            assert found[name][2] == pytest.approx(metrics, rel=1e-5), name


def test_orders_and_augmentation_of_one_process() -> None:
    (reference,) = in_trainers(None, lambda dp: own_order())
    for found in in_trainers((1, 2), lambda dp: own_order()):
        for name, (seen, weights, metrics, _) in reference.items():
            got, whole, numbers, said = found[name]
            assert [items for items, _ in got] == [items for items, _ in seen], name
            assert_trees_close(whole, weights, rtol=1e-4, name=name)
            assert numbers == pytest.approx(metrics, rel=1e-5) and not said, name


def test_over_the_data_parallel_axis() -> None:
    """Shuffled: the same set, dealt out, in equally many steps. Workers: seeded by the data-parallel coordinate."""

    class Marked(Augmented):
        def __getitem__(self, i: int) -> dict[str, Tensor]:
            return {**super().__getitem__(0), "index": torch.tensor(i)}

    def cases(dp: int) -> Any:
        return {
            "shuffled": (Net, lambda: DataLoader(TOKENS, batch_size=2, shuffle=True)),
            "workers": (Net, lambda: DataLoader(Marked("torch"), batch_size=2, num_workers=2)),
            "main": (Net, lambda: DataLoader(Marked("torch"), batch_size=2)),
            "uneven": (Net, lambda: (DataLoader(TOKENS, batch_size=5), DataLoader(TokenStream(), batch_size=5))),
        }

    a, b, c, d = in_trainers((2, 2), cases, max_epochs=1)
    for name in ("shuffled", "workers", "main", "uneven"):
        assert a[name][0] == b[name][0] and c[name][0] == d[name][0] and len(a[name][0]) == len(c[name][0]), name
        assert a[name][0] != c[name][0], name
        assert a[name][2] == d[name][2]
    items = sorted(x for r in (a, c) for seen, _ in r["shuffled"][0] for x in seen)
    assert items == sorted(int(TOKENS[i]["tokens"][0]) for i in range(24))
    assert "left out" in a["uneven"][3][0] and not a["shuffled"][3] + a["workers"][3] + a["main"][3]


def test_what_nobody_seeded_trains_all_the_same() -> None:
    """Other numbers on each rank: one warning, and the batches of the first rank."""

    def cases(dp: int) -> Any:
        def unseeded(loader: Callable[[], Any]) -> Callable[[], Any]:
            def make() -> Any:
                os.environ.pop("PL_GLOBAL_SEED")  # by which Lightning would seed once more
                random.seed(os.getpid())
                return loader()

            return make

        return {
            "augmented": (Net, unseeded(lambda: DataLoader(Augmented("python"), batch_size=4))),
            "sampler": (Net, unseeded(lambda: DataLoader(TOKENS, batch_sampler=Pairs(False)))),
        }

    first, second = in_trainers((1, 2), cases)
    for name in first:
        assert [s[0] for s in first[name][0]] == [s[0] for s in second[name][0]] and len(first[name][3]) == 1, name
        assert all(torch.equal(t, second[name][1][n]) for n, t in first[name][1].items())
    assert sorted(x for s, _ in first["sampler"][0][:12] for x in s) == sorted(int(TOKENS[i]["tokens"][0]) for i in range(24))
