"""A rank works on its own GPU: no thread or process of the package takes memory for a context on another rank's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_tp as ltp
from lightning_tp.testing import run_ranks

QUIET: dict[str, Any] = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
PLAN = {"model.0": "colwise", "model.2": "rowwise"}


def used() -> list[int]:
    """The GPUs on which this process has a context."""
    if "pretend_cuda" in sys.modules:
        return list(sys.modules["pretend_cuda"].ext.touched())
    return [i for i in range(torch.cuda.device_count()) if torch._C._cuda_hasPrimaryContext(i)]


def each_its_own(n: int, body: Callable[..., Any], *args: Any, **options: Any) -> None:
    if n > torch.cuda.device_count():
        pytest.skip(f"needs {n} GPUs")

    def run() -> list[int]:
        body(*args)
        return used()

    assert run_ranks(run, n, timeout=120, **{"init": False, **options}) == [[rank] for rank in range(n)]


class Scores:
    """An object, in a checkpoint or a batch, that holds a tensor of a GPU."""

    def __init__(self, values: Tensor) -> None:
        self.values = values


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def training_step(self, batch: Any, i: int) -> Tensor:
        x = batch["x"] if isinstance(batch, dict) else batch.values if isinstance(batch, Scores) else batch
        loss = self.model(x).square().mean()
        self.log("loss", loss, batch_size=2)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def loader() -> DataLoader:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(list(x), batch_size=2, pin_memory=True)  # type: ignore[arg-type]


def trainer(dp: int, tp: int, strategy: dict[str, Any] | None = None, **options: Any) -> L.Trainer:
    how = ltp.TPStrategy(tp=tp, dp=dp, **{"plan": PLAN, **(strategy or {})})
    return L.Trainer(accelerator="gpu", devices=dp * tp, strategy=how, **{**QUIET, "max_steps": 4, **options})


class Keeps(Callback):
    """Has an object with a tensor of its rank's GPU in each checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        return {"scores": Scores(torch.ones(3, device="cuda"))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state["scores"].values.is_cuda


SAVES: dict[str, dict[str, Any]] = {
    "a folder": {},
    "a folder, beside training": {"async_checkpoint": True},
    "a file": {"save_distributed_checkpoint": False},
}


@pytest.mark.parametrize("mesh", [(1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("how", SAVES)
def test_a_fit_that_saves_and_one_that_resumes(how: str, mesh: tuple[int, int], tmp_path: Path) -> None:
    def fit(path: str | None, steps: int) -> None:
        strategy = {**SAVES[how], "safe_globals": [Scores]}
        saves = [ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)] if path is None else []
        options: dict[str, Any] = {"callbacks": [Keeps(), *saves], "enable_checkpointing": path is None}
        trainer(*mesh, strategy, **options, max_steps=steps).fit(Net(), loader(), ckpt_path=path, weights_only=False)

    each_its_own(mesh[0] * mesh[1], fit, None, 4)
    each_its_own(mesh[0] * mesh[1], fit, f"{tmp_path}/step=2.ckpt", 4)


class Stream(IterableDataset[Any]):
    """Yields tensors of the GPU of whoever reads."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __iter__(self) -> Iterator[Any]:
        for i in range(8):
            x = torch.full((2, 8), float(i), device="cuda")
            kinds: dict[str, Any] = {"a tensor": x, "a parameter": nn.Parameter(x), "a dict": {"x": x}, "an object": Scores(x)}
            yield kinds[self.kind]


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [(kind, mesh) for kind in ("a tensor", "a parameter", "a dict") for mesh in ((1, 2), (2, 1), (2, 2))] + [("an object", (2, 1))],
    ids=str,
)
def test_a_stream_of_tensors_on_the_gpu(kind: str, mesh: tuple[int, int]) -> None:
    def fit() -> None:
        trainer(*mesh, max_steps=2).fit(Net(), DataLoader(Stream(kind), batch_size=None))

    each_its_own(mesh[0] * mesh[1], fit)


def test_prediction_and_gathers() -> None:
    class Predicts(Net):
        def predict_step(self, batch: Tensor) -> Tensor:
            return self.model(batch)

    def body() -> None:
        t, module = trainer(1, 2), Predicts()
        t.fit(module, loader())
        t.predict(module, loader())
        ltp.full_state_dict(module)
        ltp.full_gradients(module)

    each_its_own(2, body)


def arguments(x: Tensor, i: int) -> tuple[list[int], str, float]:
    return used(), str(x.device), F.relu(x).sum().item() + i


def test_arguments_of_spawned_ranks() -> None:
    """A process with tensors on a GPU starts ranks: each has them on its own."""

    def body() -> list[Any]:
        return run_ranks(arguments, 2, torch.ones(3, device="cuda"), 1, start_method="spawn", backend="nccl", timeout=120)

    assert run_ranks(body, 1, init=False, timeout=120)[0] == [([0], "cuda:0", 4.0), ([1], "cuda:1", 4.0)]
