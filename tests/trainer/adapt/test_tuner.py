"""The search for a learning rate is in test_loops.py; here: the search for a batch size, which is refused."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch.distributed as dist
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.tuner import Tuner

import lightning_tp as ltp
from lightning_tp import errors
from lightning_tp.testing import run_ranks

QUIET = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)


class Sized(BoringModel):
    batch_size = 2


def test_batch_sizes_are_not_searched(tmp_path: Path) -> None:
    """Before any rank is started; as a callback, when it starts. Other strategies have their own error, or their search."""
    trainer = L.Trainer(devices=2, strategy=ltp.TPStrategy(tp=2), **QUIET)
    with pytest.raises(ltp.TPError, match=r"`Tuner\.scale_batch_size` does not work.*one short run for each size"):
        Tuner(trainer).scale_batch_size(Sized())
    with pytest.raises(ValueError, match="not supported with distributed strategies"):
        Tuner(L.Trainer(devices=2, strategy="ddp", **QUIET)).scale_batch_size(Sized())
    assert Tuner(L.Trainer(devices=1, default_root_dir=tmp_path, **QUIET)).scale_batch_size(Sized(), max_trials=2) == 4

    def body() -> str:
        errors.HEAD_START = 0.0
        trainer = L.Trainer(devices=2, strategy=ltp.TPStrategy(tp=2), callbacks=[BatchSizeFinder()], **QUIET)
        with pytest.raises((ltp.TPError, SystemExit)) as info:
            trainer.fit(Sized())
        dist.barrier()  # rank 0 holds the store, with which the other may not have met yet
        return str(info.value)

    assert "`BatchSizeFinder` does not work" in run_ranks(body, 2, init=False, timeout=60)[0]
