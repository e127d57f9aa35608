"""Logged values, metrics, gathers, predictions and summaries of a Trainer under `TPStrategy`, against one process."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.throughput import Throughput
from lightning.pytorch.callbacks import BasePredictionWriter, EarlyStopping, ModelCheckpoint, ModelSummary, ThroughputMonitor
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import CatMetric, MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score
from torchmetrics.text import Perplexity

import lightning_tp as ltp
from examples.llama import PLAN, Llama, LlamaConfig
from lightning_tp.testing import assert_trees_close, randomize_, run_ranks
from lightning_tp.trainer.adapt.metrics import FullSummary

WORDS = 103
CONFIG = LlamaConfig(vocab_size=WORDS, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=48, max_seq_len=32, bias=True)
QUIET = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
TP2, MESH_2X2 = (1, 2), (2, 2)
both = pytest.mark.parametrize("mesh", [TP2, MESH_2X2], ids=["tp2", "2x2"])


class Net(L.LightningModule):
    """Logs whatever can be logged."""

    def __init__(self) -> None:
        super().__init__()
        self.model = randomize_(Llama(CONFIG), 0)
        for stage in ("train", "val"):
            self.add_module(f"{stage}_tokens", SumMetric())
            self.add_module(f"{stage}_mean", MeanMetric())
            self.add_module(f"{stage}_acc", MulticlassAccuracy(WORDS, average="micro"))
            self.add_module(f"{stage}_auroc", BinaryAUROC())
            self.add_module(f"{stage}_perplexity", Perplexity())
            both = {"f1": MulticlassF1Score(WORDS), "acc5": MulticlassAccuracy(WORDS, top_k=5)}
            self.add_module(f"{stage}_both", MetricCollection(both, prefix=f"{stage}_"))
        self.confusion = MulticlassConfusionMatrix(WORDS)
        self.kept_in_a_list = [SumMetric(), CatMetric()]
        self.seen: dict[str, Any] = {}

    def on_fit_start(self) -> None:
        self.kept_in_a_list = [
            m.to(self.device) for m in self.kept_in_a_list
        ]  # as Lightning moves those that are modules of the module

    def step(self, batch: dict[str, Tensor], stage: str) -> Tensor:
        logits, targets = self.model(batch["tokens"]), batch["targets"]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = losses.mean()
        train = stage == "train"
        self.log(f"{stage}_loss", loss, on_step=train, on_epoch=True, sync_dist=True, prog_bar=True)
        self.log(f"{stage}_count", float(targets.numel()), reduce_fx="sum", on_epoch=True, sync_dist=True)
        self.log(f"{stage}_max", losses.max(), reduce_fx="max", on_epoch=True, sync_dist=True)
        self.log(f"{stage}_min", losses.min(), reduce_fx=torch.min, on_epoch=True, sync_dist=True)
        self.log(f"{stage}_of_logits", logits.float().logsumexp(-1).mean(), on_epoch=True, sync_dist=True)
        metric = lambda name: getattr(self, f"{stage}_{name}")  # noqa: E731
        metric("tokens")(float(targets.numel()))
        metric("mean")(losses.detach())
        metric("acc")(logits.argmax(-1).flatten(), targets.flatten())
        metric("auroc")(logits[..., 0].sigmoid().flatten(), (targets % 2).flatten())
        metric("perplexity")(logits, targets)
        metric("both")(logits.flatten(0, 1), targets.flatten())
        for name in ("tokens", "mean", "acc", "auroc", "perplexity"):
            self.log(f"{stage}_m_{name}", metric(name), on_step=False, on_epoch=True)
        self.log_dict(metric("both"), on_step=False, on_epoch=True)
        for m in self.kept_in_a_list:
            m.update(losses.detach().mean() if isinstance(m, CatMetric) else targets.numel())
        if stage == "val":
            self.confusion.update(logits.argmax(-1).flatten(), targets.flatten())
            rows = self.all_gather({"a": targets[:, 0], "b": [float(len(targets))]})
            self.seen.setdefault("gathered", []).append((rows["a"].T.flatten().tolist(), float(rows["b"][0].sum())))
            self.seen["shape"] = tuple(rows["a"].shape)
        return loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.step(batch, "train")

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.step(batch, "val")

    def on_train_epoch_end(self) -> None:
        self.seen["computed"] = self.train_acc.compute().item()
        self.seen["listed"] = [
            float(m.compute()) if isinstance(m, SumMetric) else float(m.compute().mean()) for m in self.kept_in_a_list
        ]
        self.seen["step"] = self.trainer.callback_metrics["train_loss_step"].item()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        return {"logits": self.model(batch["tokens"]), "first": batch["tokens"][:, :3]}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-3)


def data(dp: int = 1, *, items: int = 12, batch: int = 4, dealt: bool = True) -> DataLoader:
    """Items are dealt out in turn, so that the batches of the `dp` ranks together are the batch of one process."""
    dataset = ltp.RandomTokens(items, 12, WORDS, seed=0)
    sampler = None
    if dp > 1 and dealt:
        sampler = DistributedSampler(dataset, dp, int(os.environ["RANK"]) // (int(os.environ["WORLD_SIZE"]) // dp), shuffle=False)
    return DataLoader(dataset, batch_size=batch // dp, sampler=sampler)


def trainer_of(mesh: tuple[int, int] | None, **options: Any) -> L.Trainer:
    how: Any = ltp.TPStrategy(tp=mesh[1], plan=PLAN) if mesh else "auto"
    world = int(os.environ["WORLD_SIZE"])
    return L.Trainer(accelerator="cpu", devices=world, strategy=how, **{**QUIET, "max_epochs": 2, **options})


def on(mesh: tuple[int, int] | None, body: Callable[[], Any], **options: Any) -> list[Any]:
    return run_ranks(body, mesh[0] * mesh[1] if mesh else 1, init=False, timeout=100, **options)


def numbers(trainer: L.Trainer) -> dict[str, float]:
    assert all(type(v) is Tensor for v in {**trainer.callback_metrics, **trainer.logged_metrics}.values())
    return {k: v.item() for k, v in trainer.callback_metrics.items()}


# ------------------------------------------------------------------------------------------------------ logs and metrics


@both
def test_logs_and_metrics_as_in_one_process(mesh: tuple[int, int]) -> None:
    def body(mesh: tuple[int, int] | None = None) -> tuple[dict[str, float], dict[str, Any], dict[str, Tensor]]:
        dp = mesh[0] if mesh else 1
        trainer, module = trainer_of(mesh), Net()
        trainer.fit(module, data(dp), data(dp))
        found = numbers(trainer)
        trainer.validate(module, data(dp), verbose=False)
        found.update({f"again_{k}": v for k, v in numbers(trainer).items()})
        module.seen["afterwards"] = module.confusion.compute().sum().item()  # the Trainer has let go of it
        copied = copy.deepcopy(module.confusion).compute().sum().item()
        assert copied == module.seen["afterwards"]
        assert pickle.loads(pickle.dumps(module.confusion)).dist_sync_fn is None
        return found, module.seen, ltp.full_state_dict(module.model) if mesh else module.model.state_dict()

    ref, seen, weights = on(None, body)[0]
    assert len(ref) > 35 and ref["train_m_tokens"] == 12 * 12
    for found, had, whole in on(mesh, lambda: body(mesh)):
        assert found == pytest.approx(ref, rel=1e-5)
        assert had.pop("shape") == (mesh[0], 4 // mesh[0])
        gathered, expected = had.pop("gathered"), seen["gathered"]
        assert gathered == expected
        assert had == {k: pytest.approx(v, rel=1e-5) for k, v in seen.items() if k not in ("shape", "gathered")}
        assert_trees_close(whole, weights, rtol=1e-4, name="weights")


def test_uneven_batches_weigh_what_they_hold() -> None:
    """The mean over items, where data-parallel ranks have other numbers of them: 1 here, 2 there, an odd sum of both."""

    class Weighed(Net):
        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            self.model(batch["tokens"])
            self.log("first", batch["tokens"][:, 0].float().mean(), sync_dist=True, batch_size=len(batch["tokens"]))

    def body(mesh: tuple[int, int] | None = None) -> float:
        dataset = ltp.RandomTokens(9, 12, WORDS, seed=0)
        if mesh:
            share = torch.utils.data.Subset(dataset, range(6) if dist_rank() // 2 else range(6, 9))
            loader = DataLoader(share, batch_size=2 if dist_rank() // 2 else 1)
        else:
            loader = DataLoader(dataset, batch_size=1)
        trainer = trainer_of(mesh, use_distributed_sampler=False)
        return trainer.validate(Weighed(), loader, verbose=False)[0]["first"]

    (ref,) = on(None, body)
    assert on(MESH_2X2, lambda: body(MESH_2X2)) == [pytest.approx(ref, rel=1e-6)] * 4


def dist_rank() -> int:
    return int(os.environ["RANK"])


def test_all_gather_gives_gradients_back() -> None:
    """As Lightning's own, which would look for its part by the rank in the world."""

    class Gathers(Net):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            x = (torch.arange(3.0, device=self.device) + dist_rank() // 2).requires_grad_()
            every = self.all_gather(x, sync_grads=True)
            assert every.shape == (2, 3) and not self.all_gather(x).requires_grad
            weights = torch.tensor([[1.0, 2, 3], [10, 20, 30]], device=self.device)
            (every * weights).sum().backward()
            assert torch.equal(x.grad, 2 * weights[dist_rank() // 2])  # from both data-parallel ranks
            return super().training_step(batch, batch_idx)

    on(MESH_2X2, lambda: trainer_of(MESH_2X2, fast_dev_run=True).fit(Gathers(), data(2)))


def test_sharded_tensors_never_leak() -> None:
    """A norm of FSDP2's parameter is a DTensor; split logits are one's own. Logged, gathered and returned they are plain."""

    class Leaks(Net):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            logits = self.model(batch["tokens"])
            self.log("norm", self.model.norm.weight.norm(), on_step=True, sync_dist=True)
            self.log("local", self.model.norm.weight.square().sum())
            assert type(self.all_gather(self.model.norm.weight.detach())) is Tensor
            assert type(self.all_gather(logits[:1, :1].detach())) is Tensor
            return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())

        def on_train_epoch_end(self) -> None:
            pass

    def body(mesh: tuple[int, int] | None = None) -> dict[str, float]:
        trainer = trainer_of(mesh, max_steps=1)
        trainer.fit(Leaks(), data(mesh[0] if mesh else 1))
        return numbers(trainer)

    (ref,) = on(None, body)
    for found in on(MESH_2X2, lambda: body(MESH_2X2)):
        assert found == pytest.approx(ref, rel=1e-5)


@both
def test_callbacks_that_watch_a_number(mesh: tuple[int, int], tmp_path: Path) -> None:
    """Stops at the same epoch, keeps the same files with the same names, writes the same log."""

    def body(folder: Path, mesh: tuple[int, int] | None = None) -> tuple[Any, ...]:
        dp = mesh[0] if mesh else 1
        best = ModelCheckpoint(folder, monitor="val_m_acc", mode="max", filename="{epoch}-{val_loss:.3f}", save_top_k=2)
        stop = EarlyStopping("val_loss", patience=1, min_delta=0.3)
        logger = CSVLogger(folder, name="", version="")
        trainer = trainer_of(
            mesh, callbacks=[best, stop], max_epochs=6, enable_checkpointing=True, logger=logger, log_every_n_steps=1
        )
        trainer.fit(Net(), data(dp), data(dp))
        return trainer.current_epoch, trainer.global_step, Path(best.best_model_path).name, best.best_model_score.item()

    ref = on(None, lambda: body(tmp_path / "one"))[0]
    for found in on(mesh, lambda: body(tmp_path / "split", mesh)):
        assert found[:3] == ref[:3] and found[3] == pytest.approx(ref[3], rel=1e-5)
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == sorted(p.name for p in (tmp_path / "split").iterdir())
    one, split = ((tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("one", "split"))
    assert one[0] == split[0] and len(one) == len(split)


# ----------------------------------------------------------------------------------------------------------- predictions


class Writer(BasePredictionWriter):
    """The one of Lightning's documentation: a file for each rank."""

    def __init__(self, folder: Path, interval: str) -> None:
        super().__init__(interval)
        self.folder = folder

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        torch.save((prediction, batch_indices), self.folder / f"batch_{trainer.global_rank}_{batch_idx}.pt")

    def write_on_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, predictions: Any, batch_indices: Any) -> None:
        torch.save((predictions, batch_indices), self.folder / f"epoch_{trainer.global_rank}.pt")


@both
def test_every_prediction_once(mesh: tuple[int, int], tmp_path: Path) -> None:
    """Seven items do not divide: one data-parallel rank has a batch more. Written once, whole, with their indices."""

    def body(mesh: tuple[int, int] | None = None) -> Any:
        folder = tmp_path / (str(mesh[0]) if mesh else "one")
        folder.mkdir(exist_ok=True)
        trainer = trainer_of(mesh, callbacks=[Writer(folder, "batch_and_epoch")])
        return trainer.predict(Net(), data(mesh[0] if mesh else 1, items=7, batch=mesh[0] if mesh else 1, dealt=False))

    (ref,) = on(None, body)
    ranks = on(mesh, lambda: body(mesh))
    dp, tp = mesh
    assert [len(r) for r in ranks] == ([7, 7] if dp == 1 else [4, 4, 3, 3])
    for r, found in enumerate(ranks):
        for i, got in enumerate(found):
            expected = ref[i * dp + r // tp]
            assert type(got["logits"]) is Tensor and torch.equal(got["first"].cpu(), expected["first"].cpu())
            torch.testing.assert_close(got["logits"].cpu(), expected["logits"].cpu(), rtol=1e-4, atol=1e-5)
    folder = tmp_path / str(dp)
    for kind in ("batch", "epoch"):
        files = [torch.load(p) for p in sorted(folder.glob(f"{kind}_*.pt"))]
        if kind == "epoch":
            files = [pair for predictions, (indices,) in files for pair in zip(predictions, indices, strict=True)]
        assert sorted(i for _, indices in files for i in indices) == list(range(7))
        for prediction, (index,) in files:
            torch.testing.assert_close(prediction["logits"].cpu(), ref[index]["logits"].cpu(), rtol=1e-4, atol=1e-5)


def test_writers_work_again_elsewhere(tmp_path: Path) -> None:
    def body() -> None:
        writer = Writer(tmp_path, "epoch")
        for _ in range(2):
            trainer_of(TP2, callbacks=[writer]).predict(Net(), data(items=2))
            assert "write_on_epoch_end" not in vars(writer)

    on(TP2, body)


# ----------------------------------------------------------------------------------------------- throughput and summaries


@both
def test_lightnings_throughput_counts_once(mesh: tuple[int, int]) -> None:
    class Flops(Net):
        flops_per_batch = 1000

    def body() -> dict[str, float]:
        monitor = ThroughputMonitor(lambda batch: len(batch["tokens"]), lambda batch: batch["tokens"].numel(), window_size=2)
        trainer, found = trainer_of(mesh, callbacks=[monitor], log_every_n_steps=1), {}
        trainer.fit(Flops(), data(mesh[0]))
        (throughput,) = (t for stage, t in monitor._throughputs.items() if stage == "train")
        throughput.available_flops = 5000
        assert isinstance(throughput, Throughput)
        if trainer.is_global_zero:
            found.update(throughput.compute())
        return found

    first, *_ = on(mesh, body)
    dp, tp = mesh
    assert first["device/samples_per_sec"] == pytest.approx(first["device/batches_per_sec"] * 4 / dp)
    if dp > 1:
        assert first["samples_per_sec"] == pytest.approx(first["device/samples_per_sec"] * dp)
        assert first["items_per_sec"] == pytest.approx(first["device/items_per_sec"] * dp)
        assert first["flops_per_sec"] == pytest.approx(first["device/flops_per_sec"] * dp * tp)
    assert first["device/flops_per_sec"] == pytest.approx(first["device/batches_per_sec"] * 1000 / tp)
    assert first["device/mfu"] == pytest.approx(first["device/flops_per_sec"] / 5000)


@both
def test_the_summary_shows_the_whole_and_the_share(mesh: tuple[int, int]) -> None:
    """Names, types and sizes as in one process, and a column of what a rank holds."""

    class Small(Net):
        def __init__(self) -> None:
            super().__init__()
            self.own = torch.nn.Parameter(torch.zeros(3))
            self.example_input_array = torch.zeros(2, 12, dtype=torch.long)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.model(tokens)

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + 0 * self.own.sum()

    class Shows(ModelSummary):
        shown: Any = None

        @staticmethod
        def summarize(summary_data: Any, total_parameters: int, trainable_parameters: int, *args: Any, **kwargs: Any) -> None:
            Shows.shown = (dict(summary_data), total_parameters, trainable_parameters)

    def body(mesh: tuple[int, int] | None = None) -> Any:
        how: Any = (
            ltp.TPStrategy(tp=mesh[1], plan={**{f"model.{k}": v for k, v in PLAN.items()}, "own": "replicate"}) if mesh else "auto"
        )
        world = int(os.environ["WORLD_SIZE"])
        trainer = L.Trainer(
            accelerator="cpu",
            devices=world,
            strategy=how,
            fast_dev_run=True,
            callbacks=[Shows(max_depth=2)],
            enable_progress_bar=False,
        )
        module = Small()
        trainer.fit(module, data(mesh[0] if mesh else 1))
        return Shows.shown

    table, total, trainable = on(None, body)[0]
    ours, whole, whole_trainable = on(mesh, lambda: body(mesh))[0]
    assert (whole, whole_trainable) == (total, trainable)
    held = ours.pop("Params per Device")
    assert {k: ours[k] for k in (" ", "Name", "Params", "Mode")} == {k: table[k] for k in (" ", "Name", "Params", "Mode")}
    assert len(held) == len(table["Name"]) and all(ours[k][0] == table[k][0] for k in ("In sizes", "Out sizes"))
    number = lambda text: float(text.replace(" K", "e3"))  # noqa: E731
    assert number(held[0]) == pytest.approx(number(table["Params"][0]) / (mesh[0] * mesh[1]), rel=0.2)


def test_the_summary_has_a_row_for_parameters_of_the_module_itself() -> None:
    class Own(BoringModel):
        def __init__(self) -> None:
            super().__init__()
            self.own = torch.nn.Parameter(torch.zeros(300))

    summary = FullSummary(Own(), max_depth=1)
    assert dict(summary._get_summary_data())["Params per Device"] == ["66  ", "300  "]
    assert (summary.total_parameters, summary.trainable_parameters, summary.param_nums) == (366, 366, [66])
