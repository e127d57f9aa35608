"""Batches of a Trainer's ranks: repeated samples are warned of, the first batches compared, workers seeded by the data-parallel rank."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, DistributedSampler

import lightning_tp as ltp
from lightning_tp.core.comm.mesh import make_mesh
from lightning_tp.data.group_loader import Ranks
from lightning_tp.data.resume import ResumableLoader
from lightning_tp.testing import run_ranks
from lightning_tp.trainer.loaders import (
    CHECKED_BATCHES,
    FirstBatches,
    check_batch_everywhere,
    loader_of_rank,
    warn_of_repeated_samples,
)
from lightning_tp.trainer.resume import Resume


@pytest.mark.parametrize("samples, repeated", [(8, 0), (7, 1), (5, 1)])
def test_samples_that_count_twice_are_named(samples: int, repeated: int) -> None:
    loader = DataLoader(range(samples), sampler=DistributedSampler(range(samples), 2, 0))  # type: ignore[arg-type]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_repeated_samples(loader, "validate")
        warn_of_repeated_samples(DataLoader(range(samples)), "validate")  # type: ignore[arg-type]
    assert len(caught) == bool(repeated)
    if repeated:
        text = str(caught[0].message)
        assert text.startswith(
            f"`trainer.validate`: {samples} samples do not divide among 2 data-parallel ranks, so 1 of them count(s) twice"
        )
        assert f"Use {samples - 1} or {samples + 1} samples" in text


def test_the_first_batches_of_each_step() -> None:
    batches = FirstBatches()
    assert [batches.next("a") for _ in range(5)] == [0, 1, 2, None, None] and CHECKED_BATCHES == 3
    assert batches.next("b") == 0


def test_one_group_that_differs_stops_all() -> None:
    def body() -> str:
        mesh = make_mesh("cpu", 2, 2)
        check_batch_everywhere({"x": torch.ones(2)}, mesh, torch.device("cpu"), "`step`, batch 0")
        wrong = torch.ones(2) + (dist.get_rank() == 3)
        with pytest.raises(ltp.TPError) as info:
            check_batch_everywhere({"x": wrong}, mesh, torch.device("cpu"), "`step`, batch 1")
        return str(info.value)

    first, *others = run_ranks(body, 4)
    assert "`step`, batch 1: `['x']` (2,) differs inside a tensor-parallel group" in first and others == [first] * 3


def test_loaders_are_wrapped_for_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training they can be resumed, with the epoch's order; elsewhere not; workers are seeded by the data-parallel rank."""
    monkeypatch.setenv("PL_SEED_WORKERS", "1")

    def body() -> list[Any]:
        ranks, found = Ranks(make_mesh("cpu", 2, 1)), []
        for fn, training in ((TrainerFn.FITTING, True), (TrainerFn.FITTING, False), (TrainerFn.VALIDATING, False)):
            sampler: Any = DistributedSampler(range(8), 2, dist.get_rank())  # type: ignore[arg-type]
            loader = DataLoader(range(8), sampler=sampler, num_workers=1)  # type: ignore[arg-type]
            current = SimpleNamespace(ready=4, processed=3)
            progress = SimpleNamespace(epoch_progress=SimpleNamespace(current=current))
            trainer: Any = SimpleNamespace(state=SimpleNamespace(fn=fn), training=training, fit_loop=progress)
            wrapped = loader_of_rank(loader, trainer, ranks, Resume())
            assert wrapped.worker_init_fn.keywords == {"rank": dist.get_rank()}
            found.append((type(wrapped) is ResumableLoader, sampler.epoch))
        resume = Resume()
        resume.positions = [{"read": 0}]
        trainer.state.fn, trainer.training = TrainerFn.FITTING, True
        loader_of_rank(loader, trainer, ranks, resume)
        return [*found, sampler.epoch, resume.positions]

    expected = [(True, 4), (False, 0), (False, 0), 3, []]
    assert run_ranks(body, 2) == [expected] * 2
