"""Give each rank its batches: loaders are shared in a tensor-parallel group, and the first batches of a run are compared there."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DistributedSampler

from lightning_tp.core.comm.agree import Peers
from lightning_tp.core.comm.mesh import TENSOR_PARALLEL
from lightning_tp.data.group_loader import COMPARED_EVERY, Ranks, share_loader
from lightning_tp.data.same_batch import check_same_batch
from lightning_tp.errors import TPError
from lightning_tp.trainer.patches import private
from lightning_tp.trainer.resume import Resume

CHECKED_BATCHES = 3  # of each step, in each run


def loader_of_rank(loader: Any, trainer: pl.Trainer, ranks: Ranks, resume: Resume) -> Any:
    """Wrap a loader, as Lightning has prepared it, so that a tensor-parallel group shares each batch, and training resumes where it was saved."""
    ranks.watch({"loader": loader})
    private.seed_workers(loader, ranks.dp_rank)  # Lightning would seed by the global rank
    predicts = trainer.state.fn == TrainerFn.PREDICTING
    trains = trainer.state.fn == TrainerFn.FITTING and trainer.training
    if trains:  # Lightning does it after the workers have started, and takes the order of epoch 0 when a run resumes in a later one
        progress: Any = trainer.fit_loop.epoch_progress.current
        private.set_sampler_epoch(loader, progress.processed if resume.mid_epoch else progress.ready)
    if trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING):
        warn_of_repeated_samples(loader, trainer.state.fn.value)
    shared = share_loader(
        loader,
        ranks,
        dummy_step=partial(private.predict_once_more, trainer) if predicts else None,  # FSDP2's collectives need every rank
        limit=trainer.limit_predict_batches if predicts else 1.0,
        where=f"a loader of `trainer.{trainer.state.fn.value}`" if trainer.state.fn is not None else "a loader",
    )
    return resume.resumable(shared, ranks.mesh) if trains else shared


def warn_of_repeated_samples(loader: Any, name: str) -> None:
    """Warn of samples that a sampler repeats to make the data-parallel ranks even, if it does; `name` is the Trainer's method."""
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return
    samples, ranks = len(sampler.dataset), sampler.num_replicas  # type: ignore[arg-type]
    if repeated := sampler.total_size - samples:
        rank_zero_warn(
            f"`trainer.{name}`: {samples} samples do not divide among {ranks} data-parallel ranks, so {repeated} of them count(s) twice in "
            f"what is logged. Use {samples - samples % ranks} or {sampler.total_size} samples for exact numbers."
        )


def random_roots(trainer: pl.Trainer) -> dict[str, Any]:
    """Return the user's objects that may hold random generators of their own."""
    module, data = trainer.lightning_module, getattr(trainer, "datamodule", None)
    return {"module": module, "data": data, "loaders": private.data_of(trainer), "callbacks": list(trainer.callbacks)}  # type: ignore[attr-defined]


class FirstBatches:
    """Count the batches of each step of a run: the first ones are compared inside each tensor-parallel group."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.steps: Counter[str] = Counter()

    def is_due(self, step: str) -> bool:
        """Count one more run of a step: whether random states have to be compared before it."""
        self.steps[step] += 1
        return self.steps[step] <= CHECKED_BATCHES or self.steps[step] % COMPARED_EVERY == 0

    def next(self, step: str) -> int | None:
        """Count one more batch of a step: its index if it has to be compared, else None."""
        if self.seen[step] == CHECKED_BATCHES:
            return None
        self.seen[step] += 1
        return self.seen[step] - 1


def check_batch_everywhere(batch: Any, mesh: DeviceMesh, device: torch.device, where: str) -> None:
    """Compare a batch inside each tensor-parallel group; `TPError` on all ranks if it differs in one. A collective of all ranks."""
    found = None
    try:
        check_same_batch(batch, mesh.get_group(TENSOR_PARALLEL), device, where)
    except TPError as error:
        found = str(error)
    if message := Peers().first_message(found):
        raise TPError(message)
