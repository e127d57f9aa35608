"""A Trainer is adapted to the mesh for its run: what it samples, in which mode it evaluates, what it accumulates."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch.distributed as dist
from lightning.pytorch.demos.boring_classes import BoringModel
from torchmetrics import metric

import lightning_tp as ltp
from lightning_tp.testing import run_ranks
from lightning_tp.trainer.adapt.metrics import GatherOverDataParallel

QUIET: dict[str, Any] = dict(
    accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
)


class Looks(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Any] = {}

    def on_train_start(self) -> None:
        trainer: Any = self.trainer
        self.found = {
            "sampler": trainer._accelerator_connector.use_distributed_sampler,
            "inference": [loop.inference_mode for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop)],
            "gather": isinstance(metric.gather_all_tensors, GatherOverDataParallel),
            "accumulates": trainer.accumulate_grad_batches,
        }


@pytest.mark.parametrize("dp", [1, 2])
def test_during_a_run(dp: int) -> None:
    def body() -> dict[str, Any]:
        strategy = ltp.TPStrategy(tp=1, global_batch=4)
        trainer = L.Trainer(devices=dist.get_world_size() if dist.is_initialized() else dp, strategy=strategy, max_steps=1, **QUIET)
        trainer.fit(model := Looks())  # loaders with a batch size of 1
        assert trainer.accumulate_grad_batches == 1 and not isinstance(metric.gather_all_tensors, GatherOverDataParallel)
        return model.found

    expected = {"sampler": dp > 1, "inference": [dp == 1] * 3, "gather": True, "accumulates": 4 // dp}
    assert run_ranks(body, dp, init=False) == [expected] * dp


def test_an_average_starts_once_the_model_is_split() -> None:
    def body() -> str:
        ema = L.pytorch.callbacks.EMAWeightAveraging(decay=0.5)
        trainer = L.Trainer(devices=1, strategy=ltp.TPStrategy(tp=1), callbacks=[ema], max_steps=1, **QUIET)
        trainer.fit(BoringModel())
        return type(ema._average_model).__name__

    assert run_ranks(body, 1, init=False) == ["ShardAverage"]
