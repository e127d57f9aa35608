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
from lightning_tp.data.group_loader import Ranks, share_loader
from lightning_tp.data.same_batch import check_same_batch
from lightning_tp.errors import TPError
from lightning_tp.trainer.patches import private
from lightning_tp.trainer.resume import Resume

CHECKED_BATCHES = 3  # of each step, in each run


def loader_of_rank(loader: Any, trainer: pl.Trainer, ranks: Ranks, resume: Resume) -> Any:
    """Wrap a loader of a Trainer so that the ranks of a tensor-parallel group share each batch, and training resumes where it was saved.

    Args:
        loader: As Lightning has prepared it: sharded over the data-parallel ranks.
        trainer: The Trainer that is about to use it.
        ranks: The position of this rank in the mesh.
        resume: The checkpoint that the run resumes from.
    """
    private.seed_workers(loader, ranks.dp_rank)  # Lightning would seed by the global rank
    predicts = trainer.state.fn == TrainerFn.PREDICTING
    trains = trainer.state.fn == TrainerFn.FITTING and trainer.training
    if (
        trains
    ):  # Lightning does it once the workers have started, and with the order of epoch 0 in a run that resumes from a later one
        progress: Any = trainer.fit_loop.epoch_progress.current
        private.set_sampler_epoch(loader, progress.processed if resume.mid_epoch else progress.ready)
    if trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING):
        warn_of_repeated_samples(loader, trainer.state.fn.value)
    shared = share_loader(
        loader,
        ranks,
        shadow=partial(private.predict_once_more, trainer) if predicts else None,  # FSDP2's collectives need every rank
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


class FirstBatches:
    """Count the batches of each step of a run: the first ones are compared inside each tensor-parallel group.

    Example:
        >>> batches = FirstBatches()
        >>> [batches.next("training_step") for _ in range(4)]
        [0, 1, 2, None]
    """

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def next(self, step: str) -> int | None:
        """Count one more batch of a step: its index if it has to be compared, else None."""
        if self.seen[step] == CHECKED_BATCHES:
            return None
        self.seen[step] += 1
        return self.seen[step] - 1


def check_batch_everywhere(batch: Any, mesh: DeviceMesh, device: torch.device, where: str) -> None:
    """Compare a batch inside each tensor-parallel group. A collective of all ranks.

    Raises:
        TPError: On all ranks, if it differs in one of the groups.
    """
    found = None
    try:
        check_same_batch(batch, mesh.get_group(TENSOR_PARALLEL), device, where)
    except TPError as error:
        found = str(error)
    if message := Peers().first_said(found):
        raise TPError(message)
