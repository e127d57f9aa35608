"""What a Trainer can be asked to do, in any order, with its callbacks, loggers and profilers: on a mesh as in one process.

Many small scenarios run in one launch of ranks; each is a test of its own, which looks at what all ranks brought back.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import re
import traceback
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    Callback,
    DeviceStatsMonitor,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

import lightning_tp as ltp
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp import errors
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks

CONFIG = LlamaConfig(vocab_size=103, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=48, max_seq_len=32, bias=True)
QUIET = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
TP2, MESH_2X2 = (1, 2), (2, 2)
MESHES = {"tp2": TP2, "2x2": MESH_2X2, "1x1": (1, 1)}
Found = dict[str, Any]
pytestmark = pytest.mark.timeout(600)  # the first test of a mesh runs all scenarios


class Net(L.LightningModule):
    """Knows nothing of ranks."""

    def __init__(self, lr: float = 1e-2, batch_size: int = 4, seed: int = 0) -> None:
        super().__init__()
        self.lr, self.batch_size = lr, batch_size
        self.model = randomize_(Llama(CONFIG), seed)
        self.steps: list[float] = []

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True, prog_bar=True)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(batch["tokens"]).argmax(-1)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, eps=1e-3)


class Mixed(ltp.TensorParallel, Net):
    plan = PLAN


class Restarts(Net):
    """Warm restarts, by step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, eps=1e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=2, T_mult=2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Run:
    """One scenario's surroundings: the mesh (None: one process), a folder, and what it has found."""

    def __init__(self, mesh: tuple[int, int] | None, folder: Path) -> None:
        self.mesh, self.folder = mesh, folder
        self.dp = mesh[0] if mesh else 1
        self.found: Found = {}

    def trainer(self, plan: Any = PLAN, **options: Any) -> L.Trainer:
        strategy: Any = ltp.TPStrategy(tp=self.mesh[1], plan=plan) if self.mesh else "auto"
        world = int(os.environ["WORLD_SIZE"])
        options = {**QUIET, "max_epochs": 2, "default_root_dir": self.folder, "log_every_n_steps": 1, **options}
        return L.Trainer(accelerator="cpu", devices=world, strategy=strategy, **options)

    def data(self, *, items: int = 16, batch: int = 4, seed: int = 0) -> DataLoader:
        """Items are dealt out in turn, so that the batches of the data-parallel ranks together are the batch of one process."""
        dataset = ltp.RandomTokens(items, 12, 103, seed=seed)
        sampler = None
        if self.dp > 1:  # Lightning's own sampler would shuffle
            tp = int(os.environ["WORLD_SIZE"]) // self.dp
            sampler = DistributedSampler(dataset, self.dp, int(os.environ["RANK"]) // tp, shuffle=False)
        return DataLoader(dataset, batch_size=batch // self.dp, sampler=sampler)

    def look(self, trainer: L.Trainer, module: L.LightningModule, name: str = "end") -> None:
        self.found[name] = dict(
            metrics={k: v.item() for k, v in trainer.callback_metrics.items()},
            weights={k: v.clone() for k, v in (ltp.full_state_dict(module) if self.mesh else module.state_dict()).items()},
            steps=trainer.global_step,
            epoch=trainer.current_epoch,
        )


SCENARIOS: dict[str, Callable[[Run], None]] = {}


def scenario(body: Callable[[Run], None]) -> Callable[[Run], None]:
    SCENARIOS[body.__name__] = body
    return body


# ----------------------------------------------------------------------------------------------------------------- loops


@scenario
def any_order(run: Run) -> None:
    """Everything on one module, evaluation first; a second Trainer goes on with it."""
    for kind in (Net, Mixed):
        module, data = kind(), run.data()
        trainer = run.trainer()
        trainer.validate(module, data, verbose=False)
        run.look(trainer, module, f"{kind.__name__} validate")
        trainer.predict(module, data)
        trainer.fit(module, data, data)
        run.look(trainer, module, f"{kind.__name__} fit")
        trainer.test(module, data, verbose=False)
        run.look(trainer, module, f"{kind.__name__} test")
        predicted = [p[0, :4].tolist() for p in trainer.predict(module, data)]
        run.found[f"{kind.__name__} predicted"] = predicted if int(os.environ["RANK"]) < 2 else None
        trainer.fit_loop.max_epochs = 3
        trainer.fit(module, data, data)
        trainer.validate(module, data, verbose=False)
        run.look(trainer, module, f"{kind.__name__} fit again")
        other = run.trainer(max_epochs=1)
        other.test(module, data, verbose=False)
        other.fit(module, data)
        run.look(other, module, f"{kind.__name__} second trainer")


@scenario
def limits(run: Run) -> None:
    for name, options in {
        "fast_dev_run": dict(fast_dev_run=True),
        "fast_dev_run_2": dict(fast_dev_run=2),
        "overfit": dict(overfit_batches=2, max_epochs=3),
        "limit": dict(limit_train_batches=3, limit_val_batches=1, limit_test_batches=2),
        "shares": dict(limit_train_batches=0.5, limit_val_batches=0.5),
        "val_check_interval": dict(val_check_interval=0.5),
        "val_by_batches": dict(val_check_interval=3, check_val_every_n_epoch=None),
        "every_2nd_epoch": dict(check_val_every_n_epoch=2, max_epochs=3),
        "max_steps": dict(max_steps=5, max_epochs=-1),
        "min_epochs": dict(min_epochs=2, max_steps=6, max_epochs=None),
        "no_sanity": dict(num_sanity_val_steps=0),
        "whole_sanity": dict(num_sanity_val_steps=-1),
        "accumulate": dict(accumulate_grad_batches=3),
        "detect_anomaly": dict(detect_anomaly=True, max_steps=1),
        "reload": dict(reload_dataloaders_every_n_epochs=1),
    }.items():
        trainer, module = run.trainer(**options), Net()
        counts: list[int] = []
        module.on_validation_end = lambda counts=counts, trainer=trainer: counts.append(trainer.global_step)
        trainer.fit(module, run.data(), run.data(seed=1))
        run.look(trainer, module, name)
        run.found[f"{name} validated at"] = counts


class Stream(IterableDataset):
    """The same items, which can't be asked for by index."""

    def __init__(self, items: int, seed: int) -> None:
        self.items, self.seed = items, seed

    def __iter__(self) -> Any:
        return iter([dict(item) for item in ltp.RandomTokens(self.items, 12, 103, seed=self.seed)])


class OfSeveral(Net):
    """Takes batches of several loaders: in a dict, some of them None, or by the number of the loader."""

    def total(self, batch: Any) -> Tensor:
        losses = [self.loss(of) for of in ([batch] if "tokens" in batch else batch.values()) if of is not None]
        return torch.stack(losses).sum()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.total(batch)
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.total(batch), sync_dist=True, batch_size=len(batch["tokens"]) if "tokens" in batch else 1)

    test_step = validation_step


@scenario
def several_loaders(run: Run) -> None:
    """`CombinedLoader` in all modes, of loaders by index and of streams, of unequal lengths; several loaders to evaluate on."""

    def stream(items: int, seed: int) -> DataLoader:
        return DataLoader(Stream(items, seed), batch_size=4 // run.dp)

    kinds: dict[str, Callable[[], dict[str, DataLoader]]] = {
        "by index": lambda: {"a": run.data(items=16), "b": run.data(items=24, seed=1)},
        "streams": lambda: {"a": stream(16, 0), "b": stream(24, 1)},
        "both": lambda: {"a": stream(24, 0), "b": run.data(items=16, seed=1)},
    }
    for name, make in kinds.items():
        for mode in ("min_size", "max_size", "max_size_cycle"):
            trainer, module = run.trainer(limit_train_batches=5 if mode == "max_size_cycle" else None), OfSeveral()
            trainer.fit(module, CombinedLoader(make(), mode), CombinedLoader(make(), mode))
            run.look(trainer, module, f"{name} {mode}")
        trainer, module = run.trainer(val_check_interval=3, check_val_every_n_epoch=None), OfSeveral()
        trainer.fit(module, run.data(), list(make().values()))
        run.look(trainer, module, f"{name} one after the other")
        trainer.test(module, CombinedLoader(make(), "sequential"), verbose=False)
        run.look(trainer, module, f"{name} sequential")


@scenario
def ends(run: Run) -> None:
    """A last batch that is smaller, of loaders by index; shares of loaders; loaders made anew in each epoch."""
    for name, options in {
        "smaller": {},
        "shares": dict(limit_train_batches=0.6, limit_val_batches=0.6, val_check_interval=0.5),
        "anew": dict(reload_dataloaders_every_n_epochs=1, max_epochs=3),
        "by_batches": dict(val_check_interval=5, check_val_every_n_epoch=None, max_epochs=3),
        "accumulated": dict(accumulate_grad_batches=3, val_check_interval=1),
    }.items():
        trainer, module, made = run.trainer(**options), Net(), []
        seen: list[int] = []
        module.on_validation_end = lambda seen=seen, trainer=trainer: seen.append(trainer.global_step)

        def train(made: list[int] = made) -> DataLoader:
            made.append(0)
            return run.data(items=14)

        module.train_dataloader, module.val_dataloader = train, lambda: run.data(items=18, seed=1)
        trainer.fit(module)
        run.look(trainer, module, name)
        run.found[f"{name} validated at, made"] = (seen, len(made))


@scenario
def on_disk(run: Run) -> None:
    """Lightning's defaults for loggers and checkpoints, the best k, and a writer of predictions: the same files."""

    class Writes(BasePredictionWriter):
        def write_on_epoch_end(self, trainer: Any, module: Any, predictions: Any, indices: Any) -> None:
            part = trainer.global_rank // run.mesh[1] if run.mesh else 0
            torch.save(predictions, Path(self.folder) / f"predicted-{part}.pt")

    keep = [
        ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=True),
        ModelCheckpoint(every_n_train_steps=3, filename="{step}", save_top_k=-1),
    ]
    writer = Writes("epoch")
    writer.folder = run.folder
    trainer, module = run.trainer(logger=None, callbacks=[*keep, writer], enable_checkpointing=True, max_epochs=4), Net()
    module.save_hyperparameters({"lr": 1e-2})
    trainer.fit(module, run.data(), run.data(seed=1))
    run.look(trainer, module)
    run.found["kept"] = sorted(Path(p).name for p in keep[0].best_k_models), Path(keep[0].best_model_path).name
    trainer.predict(module, run.data())
    for dp_rank in range(1, run.dp):  # a share each, by its own name
        if trainer.is_global_zero:
            (run.folder / f"predicted-{dp_rank}.pt").unlink()
    if run.mesh:
        dist.barrier()


@scenario
def barebones(run: Run) -> None:
    trainer, module = run.trainer(barebones=True, **dict.fromkeys(QUIET), log_every_n_steps=None), Net()
    module.log = lambda *args, **kwargs: None
    trainer.fit(module, run.data())
    run.look(trainer, module)


@scenario
def inference_mode(run: Run) -> None:
    """On CUDA Lightning evaluates in inference mode; on gloo it doesn't, so here gloo is called nccl while it looks."""
    for name, mode in {"on": True, "off": False}.items():
        module, data, trainer = Net(), run.data(), run.trainer(inference_mode=mode, max_epochs=1)
        modes: list[bool] = []
        module.on_validation_batch_end = lambda *args, modes=modes: modes.append(torch.is_inference_mode_enabled())
        with _called_nccl():
            trainer.validate(module, data, verbose=False)
            run.look(trainer, module, f"{name} validate")
            trainer.predict(module, data)
            trainer.fit(module, data, data)
            trainer.test(module, data, verbose=False)
            trainer.fit_loop.max_epochs = 2
            trainer.fit(module, data, data)
            trainer.validate(module, data, verbose=False)
        run.look(trainer, module, name)
        run.found[f"{name} modes"] = modes if run.dp == 1 else None  # FSDP2 can't: there it is no_grad


@contextlib.contextmanager
def _called_nccl() -> Any:
    own = dist.get_backend
    from lightning.pytorch.loops import utilities

    class Lies:
        def __getattr__(self, name: str) -> Any:
            return (lambda *args: "nccl") if name == "get_backend" else getattr(dist, name)

    assert own is utilities.dist.get_backend
    utilities.dist = Lies()
    try:
        yield
    finally:
        utilities.dist = dist


class OneIsLate(Callback):
    """The clocks of the ranks differ: that of rank 0 counts."""

    def __init__(self, timer: Timer) -> None:
        self.timer = timer

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.timer._duration = 0 if trainer.global_step >= 3 + 2 * (trainer.global_rank > 0) else 1000


@scenario
def max_time(run: Run) -> None:
    timer = Timer(duration="00:00:10:00")
    trainer, module = run.trainer(callbacks=[OneIsLate(timer), timer], max_epochs=5), Net()
    trainer.fit(module, run.data())
    run.look(trainer, module)
    trainer = run.trainer(max_time="00:01:00:00", max_epochs=1)
    trainer.fit(module, run.data())
    run.look(trainer, module, "in time")


def of_others(name: str) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    common = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=48)
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=103, n_embd=32, n_head=4, n_layer=2, n_positions=16)
        model = transformers.GPT2LMHeadModel(config)
    elif name == "bert":
        model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=103, max_position_embeddings=16, **common))
    else:
        config = transformers.ViTConfig(image_size=8, patch_size=2, num_labels=103, **common)
        model = transformers.ViTForImageClassification(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return randomize_(model)


class OfOthers(Net):
    """Of Hugging Face, and no plan is given."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.model = name, of_others(name)

    def out(self, batch: dict[str, Tensor]) -> Any:
        tokens = batch["tokens"]
        if self.name == "vit":
            images = F.one_hot(tokens, 103).float()[:, :, :16].reshape(len(tokens), 3, 8, 8)
            return self.model(pixel_values=images, labels=tokens[:, 0])
        return self.model(input_ids=tokens, labels=tokens)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.out(batch).loss

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.out(batch).logits.argmax(-1)


@scenario
def models_of_others(run: Run) -> None:
    for name in ("gpt2", "bert", "vit"):
        module, data = OfOthers(name), run.data()
        keep = ModelCheckpoint(run.folder / name, filename="{epoch}", save_top_k=-1)
        options = dict(callbacks=[EMAWeightAveraging(decay=0.7), keep], enable_checkpointing=True, gradient_clip_val=1.0)
        trainer = run.trainer(plan=None, **options)
        trainer.validate(module, data, verbose=False)
        run.look(trainer, module, f"{name} validate")
        trainer.fit(module, data, data)
        run.look(trainer, module, f"{name} fit")
        trainer.test(module, data, verbose=False)
        predicted = torch.cat(trainer.predict(module, data)).flatten()[:8].tolist()
        run.found[f"{name} predicted"] = predicted if run.dp == 1 else None
        trainer = run.trainer(plan=None, callbacks=[EMAWeightAveraging(decay=0.7)])
        trainer.fit(again := OfOthers(name), data, data, ckpt_path=run.folder / name / "epoch=0.ckpt")
        run.look(trainer, again, f"{name} resumed")


# --------------------------------------------------------------------------------------------- loggers, profilers, bars


@scenario
def profilers(run: Run) -> None:
    from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler

    for kind in (SimpleProfiler, AdvancedProfiler, PyTorchProfiler):
        folder = run.folder / kind.__name__
        options = dict(export_to_chrome=False) if kind is PyTorchProfiler else {}
        trainer, module = run.trainer(profiler=kind(folder, "found", **options), max_epochs=1), Net()
        trainer.fit(module, run.data(), run.data())
        run.look(trainer, module, kind.__name__)


@scenario
def loggers(run: Run) -> None:
    """One set of files, with the same rows."""
    kinds = [CSVLogger(run.folder, name="csv"), TensorBoardLogger(run.folder, name="board")]
    callbacks = [LearningRateMonitor(log_momentum=True), DeviceStatsMonitor(cpu_stats=False)]
    trainer, module = run.trainer(logger=kinds, callbacks=callbacks, enable_checkpointing=True), Restarts()
    trainer.fit(module, run.data(), run.data())
    run.look(trainer, module)
    run.found["rates"] = {k: v.tolist() for k, v in callbacks[0].last_momentum_values.items() if isinstance(v, Tensor)}
    rows = (run.folder / "csv" / "version_0" / "metrics.csv").read_text().splitlines() if trainer.is_global_zero else []
    run.found["csv"] = (rows[0].split(","), len(rows)) if rows else None


@scenario
def bars(run: Run) -> None:
    for name, bar in {"tqdm": TQDMProgressBar(refresh_rate=1), "rich": RichProgressBar()}.items():
        trainer, module = run.trainer(callbacks=[bar], enable_progress_bar=True, enable_model_summary=True), Net()
        trainer.fit(module, run.data(), run.data())
        run.look(trainer, module, name)
        shown = bar.get_metrics(trainer, module)
        run.found[f"{name} shows"] = {k: v for k, v in shown.items() if isinstance(v, float)}


# -------------------------------------------------------------------------------------------------------------- callbacks


class Counts(Callback):
    """Has a state of its own."""

    def __init__(self) -> None:
        self.seen = {"batches": 0, "last": None}

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.seen = {"batches": self.seen["batches"] + 1, "last": torch.tensor([float(trainer.global_step)])}

    def state_dict(self) -> Any:
        return self.seen

    def load_state_dict(self, state: Any) -> None:
        self.seen = state


@scenario
def states_in_checkpoints(run: Run) -> None:
    """Callbacks, schedulers, loops and accumulation go on where they were; with tp=dp=1 as well."""
    for kind in (Restarts, Net):
        folder = run.folder / kind.__name__

        def callbacks(folder: Path = folder) -> list[Any]:
            keep = ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, save_last=True)
            return [Counts(), GradientAccumulationScheduler({0: 1, 1: 2}), Timer(duration="00:01:00:00"), keep]

        trainer, module = run.trainer(callbacks=callbacks(), enable_checkpointing=True, max_epochs=4), kind()
        trainer.fit(module, run.data(), run.data())
        run.look(trainer, module, f"{kind.__name__} whole")
        again, module = run.trainer(callbacks=callbacks(), enable_checkpointing=True, max_epochs=4), kind(seed=3)
        again.fit(module, run.data(), run.data(), ckpt_path=folder / "epoch=1-step=6.ckpt")
        run.look(again, module, f"{kind.__name__} resumed")
        counts = again.callbacks[[type(c) for c in again.callbacks].index(Counts)]
        run.found[f"{kind.__name__} counts"] = counts.seen["batches"], counts.seen["last"].item()
        whole, resumed = (run.found[f"{kind.__name__} {w}"]["weights"] for w in ("whole", "resumed"))
        assert all(torch.equal(t, resumed[n]) for n, t in whole.items())


@scenario
def weights_only(run: Run) -> None:
    """Evaluation reads them, also after training; training can't go on from them."""
    keep = ModelCheckpoint(run.folder, filename="end", save_weights_only=True)
    trainer, module = run.trainer(callbacks=[keep], enable_checkpointing=True, max_epochs=1), Net()
    trainer.fit(module, run.data())
    trainer.validate(module, run.data(), ckpt_path=run.folder / "end.ckpt", verbose=False)
    run.look(trainer, module)
    errors.HEAD_START = 0.0
    with pytest.raises((ltp.TPError, KeyError, SystemExit), match=r"weights only|only the model|^1$"):
        trainer.fit(module, run.data(), ckpt_path=run.folder / "end.ckpt")


@scenario
def lr_find(run: Run) -> None:
    module, data = Net(lr=1e-3), run.data(items=64)
    trainer = run.trainer(max_epochs=1)
    found = Tuner(trainer).lr_find(module, data, num_training=12, min_lr=1e-5, max_lr=0.1)
    run.found["metrics"] = dict(metrics=dict(enumerate(found.results["loss"])), steps=len(found.results["lr"]))
    run.found["suggested"] = pytest.approx(found.suggestion()), module.lr == found.suggestion()
    run.look(trainer, module, "restored")
    run.found["random"] = torch.rand(()).item() if trainer.is_global_zero else None
    trainer.fit(module, data)
    run.look(trainer, module)


@scenario
def memory(run: Run) -> None:
    """Nothing of ours holds on to a model, an optimizer or a Trainer that its owner has let go of; groups are not made anew."""
    module = Net()
    for _ in range(2):
        trainer = run.trainer(max_epochs=1)
        trainer.fit(module, run.data(), run.data())
        trainer.validate(module, run.data(), verbose=False)
        groups = _groups()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, run.data())
    refs = [weakref.ref(x) for x in (module, trainer, trainer.strategy, module.model, trainer.optimizers[0])]
    refs += [weakref.ref(p) for p in module.parameters()]
    refs += [weakref.ref(v) for s in trainer.optimizers[0].state.values() for v in s.values() if isinstance(v, Tensor)]
    assert _groups() == groups, (groups, _groups())
    del module, trainer
    gc.collect()
    left = [type(r()).__name__ for r in refs if r() is not None]
    assert not left, left
    run.found["initialized"] = dist.is_initialized() if run.mesh else True


def _groups() -> int:
    return len(dist.distributed_c10d._world.pg_map) if dist.is_initialized() else 0


# ---------------------------------------------------------------------------------------------------------- what is held


def run_all(mesh: tuple[int, int] | None, folder: Path) -> dict[str, Found | str]:
    out: dict[str, Found | str] = {}
    only = os.environ.get("LOOPS", "").split()  # while one of them is worked on
    for name, body in SCENARIOS.items():
        if only and name not in only:
            continue
        torch.manual_seed(0)
        here = Run(mesh, folder / name)
        here.folder.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                body(here)
            except BaseException:  # the next one may go well all the same
                here.found["failed"] = traceback.format_exc()
        here.found["warnings"] = sorted({f"{w.category.__name__}: {w.message}" for w in caught})
        out[name] = here.found
    return out


@functools.cache
def results(mesh: tuple[int, int] | None, folder: Path) -> list[dict[str, Any]]:
    return run_ranks(lambda: run_all(mesh, folder), mesh[0] * mesh[1] if mesh else 1, init=False, timeout=500)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loops")


NOBODY_CAN_HELP = (  # Lightning's own, about these data, and about the sampler that deals them out
    "You requested to overfit",
    "does not have many workers",
    "exists and is not empty",
    "`isinstance(treespec, LeafSpec)` is deprecated",
)


def files(folder: Path) -> set[str]:
    """A checkpoint is one name, whether a file or a folder."""
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not any(q.suffix == ".ckpt" for q in p.parents)}
    return {re.sub(r"events.out.*|-\d(?=\.txt$)", "", name) for name in found}  # of profiles there is one for each rank


@pytest.mark.slow
@pytest.mark.parametrize("mesh", list(MESHES))
@pytest.mark.parametrize("name", list(SCENARIOS))
def test_as_in_one_process(name: str, mesh: str, folder: Path) -> None:
    ref = results(None, folder / "one")[0][name]
    assert "failed" not in ref, ref["failed"]
    for rank, ranks in enumerate(results(MESHES[mesh], folder / mesh)):
        found = ranks[name]
        assert "failed" not in found, f"rank {rank}: {found['failed']}"
        assert list(found) == list(ref)
        for key, expected in ref.items():
            if key == "warnings":
                new = [w for w in found[key] if w not in expected and not any(known in w for known in NOBODY_CAN_HELP)]
                assert not new, new
            elif isinstance(expected, dict) and "metrics" in expected:
                got = found[key]
                step = "_step" if MESHES[mesh][0] > 1 else "-"
                metrics = {k: v for k, v in expected["metrics"].items() if not str(k).endswith(step)}
                assert {k: got["metrics"][k] for k in metrics} == pytest.approx(metrics, rel=1e-5), key
                assert_trees_close(got.get("weights", {}), expected.get("weights", {}), rtol=1e-4, name=f"weights, {key}")
                assert [got.get(k) for k in ("steps", "epoch")] == [expected.get(k) for k in ("steps", "epoch")], key
            elif isinstance(expected, dict):
                assert found[key] == pytest.approx(expected, rel=1e-4), key
            elif found[key] is not None:
                assert found[key] == expected, key
    assert files(folder / mesh / name) == files(folder / "one" / name)
