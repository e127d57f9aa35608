"""Loaders under a Trainer on a mesh: what every step sees, and the weights after it, are those of one process."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

import lightning_tp as ltp
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks

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
    assert "dropped" in a["uneven"][3][0] and not a["shuffled"][3] + a["workers"][3] + a["main"][3]


def test_what_nobody_seeded_trains_all_the_same() -> None:
    """Seeded otherwise on each rank: the batches of the first rank. At most one warning: the states of Python's generator are made equal first."""

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
        assert [s[0] for s in first[name][0]] == [s[0] for s in second[name][0]] and len(first[name][3]) <= 1, name
        assert all(torch.equal(t, second[name][1][n]) for n, t in first[name][1].items())
    assert sorted(x for s, _ in first["sampler"][0][:12] for x in s) == sorted(int(TOKENS[i]["tokens"][0]) for i in range(24))
