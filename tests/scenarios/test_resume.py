"""A run that goes on from a checkpoint is the run that was not interrupted: bitwise on the same mesh, to rounding on any other one."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import lightning_tp as ltp
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp.styles import FusedColwise
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks

# tp=4 does not divide 2 key/value heads (shared), 90 (uneven) nor 103 (uneven vocabulary, tied); gate and up are one fused weight
CONFIG = LlamaConfig(
    vocab_size=103, dim=64, num_layers=2, num_heads=8, num_kv_heads=2, hidden_dim=90, max_seq_len=16, bias=True, tied=True
)
FUSED_PLAN: dict[str, Any] = {
    "layers.*.feed_forward.w13": FusedColwise(parts=2),
    **{k: v for k, v in PLAN.items() if not k.endswith(("w1", "w3"))},
}
QUIET = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
STEPS, EPOCHS = 4, 2  # steps of an epoch
PLAIN = "plain"  # a Trainer without this package
MESHES: dict[int, list[Any]] = {1: [PLAIN, (1, 1)], 2: [(1, 2), (2, 1)], 4: [(2, 2), (1, 4)]}
ALL = [mesh for meshes in MESHES.values() for mesh in meshes]


class FeedForward(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.w13 = nn.Linear(64, 180)
        self.w2 = nn.Linear(90, 64)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.dropout(self.w2(F.silu(gate) * up))


class Net(L.LightningModule):
    """Knows nothing of ranks."""

    def __init__(self, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.model = Llama(CONFIG)
        for layer in self.model.layers:
            layer.feed_forward = FeedForward(dropout)
        randomize_(self.model, seed)
        self.losses: dict[int, float] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses[self.trainer.global_step] = float(self.trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean"))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Counts(Callback):
    """Has a state."""

    batches = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.batches += 1

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches = state["batches"]


class Noisy(Dataset):
    """Draws from all generators that there are, wherever it is read."""

    def __init__(self, seed: int = 0) -> None:
        self.tokens = ltp.RandomTokens(4 * STEPS, 12, 103, seed=seed)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        import numpy

        item = self.tokens[i]
        shift = int(torch.randint(103, ())) + random.randrange(103) + int(numpy.random.randint(103))
        return {"tokens": (item["tokens"] + shift) % 103, "targets": item["targets"]}


def trainer_of(mesh: Any, *callbacks: Callback, strategy: dict[str, Any] | None = None, **options: Any) -> L.Trainer:
    how: Any = "auto" if mesh == PLAIN else ltp.TPStrategy(tp=mesh[1], plan=FUSED_PLAN, **(strategy or {}))
    options = {**QUIET, "max_epochs": EPOCHS, "enable_checkpointing": False, **options}
    return L.Trainer(accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy=how, callbacks=list(callbacks), **options)


def dealt(mesh: Any) -> DataLoader:
    """Shuffled by epoch, so that the batches of the data-parallel ranks together are that of one process, on any mesh."""
    dataset = ltp.RandomTokens(4 * STEPS, 12, 103)
    dp, tp = (1, 1) if mesh == PLAIN else mesh
    sampler = DistributedSampler(dataset, dp, int(os.environ["RANK"]) // tp, shuffle=True)
    return DataLoader(dataset, batch_size=4 // dp, sampler=sampler)


class SavesAt(Callback):
    """A checkpoint after each of these steps, where `ModelCheckpoint(every_n_train_steps=..)` makes it."""

    def __init__(self, folder: Path, *steps: int) -> None:
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")


def result(trainer: L.Trainer, module: Net) -> dict[str, Any]:
    counts = [c.batches for c in trainer.callbacks if isinstance(c, Counts)]
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    return dict(
        losses=dict(module.losses), weights=ltp.full_state_dict(module), counts=counts, rate=rate, epoch=trainer.current_epoch
    )


def name_of(mesh: Any) -> str:
    return mesh if mesh == PLAIN else f"{mesh[0]}x{mesh[1]}"


def check(got: dict[str, Any], ref: dict[str, Any], what: str, *, after: int, bitwise: bool) -> None:
    expected = {step: loss for step, loss in ref["losses"].items() if step > after}
    assert [got[k] for k in ("counts", "rate", "epoch")] == [ref[k] for k in ("counts", "rate", "epoch")], what
    if bitwise:
        assert got["losses"] == expected, what
        assert all(torch.equal(t, got["weights"][name]) for name, t in ref["weights"].items()), what
    else:
        assert got["losses"] == pytest.approx(expected, rel=1e-5), what
        assert_trees_close(got["weights"], ref["weights"], rtol=1e-4, name=what)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run on each mesh, with checkpoints; and what came of them."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for world in MESHES:

        def body(world: int = world) -> dict[str, Any]:
            out = {}
            for mesh in MESHES[world]:
                trainer, module = trainer_of(mesh, Counts(), SavesAt(folder / name_of(mesh), 3, 4)), Net()
                trainer.fit(module, dealt(mesh))
                out[name_of(mesh)] = result(trainer, module)
            return out

        found |= run_ranks(body, world, init=False)[0]
    for name, run in found.items():
        check(run, found[PLAIN], name, after=0, bitwise=False)
    return folder, found


@pytest.mark.parametrize(
    "target", [mesh if mesh == (1, 2) else pytest.param(mesh, marks=pytest.mark.slow) for mesh in ALL], ids=str
)
def test_any_mesh_to_any_mesh(target: Any, written: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """From the middle of an epoch, whose data are gone through from there on."""
    folder, ref = written
    world = next(size for size, meshes in MESHES.items() if target in meshes)
    sources = [*ALL, "consolidated"]
    step = 3 if target != PLAIN else STEPS  # a plain Trainer reads an epoch from its start again
    paths = {source: folder / name_of(source) / f"step={step}.ckpt" for source in ALL}
    paths["consolidated"] = paths[2, 2]
    for source, path in paths.items():
        if path.is_dir() and (target == PLAIN or source == "consolidated"):
            paths[source] = tmp_path / f"{source}.ckpt"
            ltp.consolidate(path, paths[source])

    def body() -> dict[str, Any]:
        out = {}
        for source in sources:
            trainer, module = trainer_of(target, Counts()), Net(seed=1)
            trainer.fit(module, dealt(target), ckpt_path=paths[source])
            out[source] = result(trainer, module)
        return out

    for source, got in run_ranks(body, world, init=False, timeout=300)[0].items():
        name = "2x2" if source == "consolidated" else name_of(source)
        check(got, ref[name], f"{source} -> {target}", after=step, bitwise=source == target and source != PLAIN)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_the_same_mesh_goes_on_bitwise(world: int, tmp_path: Path) -> None:
    """At the end of an epoch and between two batches; shuffled by torch's generator or one of the loader's own, with random data read by workers or
    by the ranks themselves, and dropout."""

    def loader(kind: str, dp: int) -> DataLoader:
        options: dict[str, Any] = {"generator": torch.Generator().manual_seed(5)} if kind == "generator" else {}
        return DataLoader(Noisy(), batch_size=4 // dp, shuffle=True, num_workers=2 if kind == "workers" else 0, **options)

    def body() -> dict[str, Any]:
        out = {}
        for mesh in MESHES[world]:
            if mesh == PLAIN:
                continue
            for kind in ("plain", "workers", "generator"):
                folder = tmp_path / name_of(mesh) / kind
                L.seed_everything(7, workers=True, verbose=False)
                trainer, module = trainer_of(mesh, Counts(), SavesAt(folder, 3, 4, 6)), Net(dropout=0.2)
                trainer.fit(module, loader(kind, mesh[0]))
                whole = result(trainer, module)
                for step in (3, 6) if kind == "generator" else (3, 4, 6):
                    L.seed_everything(8, workers=True, verbose=False)
                    trainer, module = trainer_of(mesh, Counts()), Net(seed=1, dropout=0.2)
                    trainer.fit(module, loader(kind, mesh[0]), ckpt_path=folder / f"step={step}.ckpt")
                    out[name_of(mesh), kind, step] = result(trainer, module), whole
        return out

    for found in run_ranks(body, world, init=False, timeout=200):
        for (mesh, kind, step), (got, whole) in found.items():
            check(got, whole, f"{mesh} {kind} {step}", after=step, bitwise=True)


class Stateful:
    """A loader as torchdata's: it knows where it is. Each data-parallel rank has data of its own, and of another length."""

    def __init__(self, dp_rank: int) -> None:
        self.dp_rank, self.at = dp_rank, 10 * dp_rank

    def __iter__(self) -> Any:
        for _ in range(STEPS):
            self.at += 1
            yield torch.tensor([self.at])

    def __len__(self) -> int:
        return STEPS

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Seen(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(1, 1), []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append(int(batch[0]))
        return self.layer(batch.float().view(1, 1)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-5)


def test_loaders_with_a_state_keep_one_for_each_data_parallel_rank(tmp_path: Path) -> None:
    def body() -> Any:
        rank = int(os.environ["RANK"])
        fit = dict(callbacks=[SavesAt(tmp_path, 2)], max_epochs=1, enable_checkpointing=False, **QUIET)
        trainer = L.Trainer(accelerator="cpu", devices=2, strategy=ltp.TPStrategy(tp=1), **fit)
        trainer.fit(Seen(), Stateful(rank))
        module = Seen()
        trainer = L.Trainer(
            accelerator="cpu", devices=2, strategy=ltp.TPStrategy(tp=1), **{**fit, "callbacks": [], "max_epochs": 2}
        )
        trainer.fit(module, Stateful(rank), ckpt_path=tmp_path / "step=2.ckpt")
        return module.seen[:2]

    assert run_ranks(body, 2, init=False) == [[3, 4], [13, 14]]


def test_dropout_of_one_process_goes_on_on_another_mesh(tmp_path: Path) -> None:
    """`dropout="exact"`, and an order of the data that torch's generator draws, between meshes of the same data-parallel size."""

    def run(mesh: Any, path: Path | None) -> dict[str, Any]:
        L.seed_everything(7 if path is None else 8, verbose=False)
        trainer, module = trainer_of(mesh, Counts(), SavesAt(tmp_path, 2), strategy=dict(dropout="exact")), Net(dropout=0.2)
        loader = DataLoader(ltp.RandomTokens(4 * STEPS, 12, 103), batch_size=4, shuffle=True)
        trainer.fit(module, loader, ckpt_path=path)
        return result(trainer, module)

    whole = run_ranks(lambda: run((1, 1), None), 1, init=False)[0]
    check(run_ranks(lambda: run((1, 2), tmp_path / "step=2.ckpt"), 2, init=False)[0], whole, "1x1 -> 1x2", after=2, bitwise=False)
