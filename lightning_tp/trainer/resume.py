"""Resume a run where it was saved: random states of every rank, and the position of each training loader in its epoch."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.distributed.device_mesh import DeviceMesh

from lightning_tp.checkpoint import to_bytes
from lightning_tp.core.comm.agree import Peers
from lightning_tp.core.comm.mesh import DATA_PARALLEL
from lightning_tp.core.ops.rng import rng_state, set_shared_state
from lightning_tp.data.resume import Position, ResumableLoader
from lightning_tp.trainer.adapt.global_batch import rescale
from lightning_tp.trainer.patches import private

RNG_STATE = "lightning_tp_rng_state"  # in a checkpoint: the random states of all ranks
LOADERS = "lightning_tp_loaders"  # likewise: the positions of the training loaders of each data-parallel rank


class Resume:
    """What a strategy keeps of the checkpoint that a run resumes from, until the run has reached that point.

    Attributes:
        positions: Of this rank's training loaders, in their order; each loader takes the first one.
        epoch_is_over: The checkpoint was saved between two epochs.
        rng_at_step: The random states of a checkpoint from the middle of an epoch, until its next step.
        accumulate: Batches to accumulate in the rest of an epoch that was begun on another mesh, with `global_batch`.
    """

    def __init__(self) -> None:
        self.positions: list[Position] = []
        self.epoch_is_over = False
        self.rng_at_step: dict[str, Any] | None = None
        self.accumulate: float | None = None

    # ------------------------------------------------------------------------------------------------------------ saving

    def save(self, checkpoint: dict[str, Any], trainer: pl.Trainer, mesh: DeviceMesh, *, global_batch: int | None) -> None:
        """Add random states and positions of loaders to a checkpoint that Lightning is about to save. A collective."""
        checkpoint[RNG_STATE] = rng_state(mesh)
        fit_loop = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
        fit_loop.pop("combined_loader", None)  # Lightning's list has the states of one rank
        loaders: list[Any] = [x for x in private.loaders_of(trainer.fit_loop) if type(x) is ResumableLoader]
        if not loaders or trainer.state.fn != TrainerFn.FITTING:
            return
        prefetched = private.num_prefetched(trainer)
        every = Peers().gather([loader.position(prefetched) for loader in loaders])
        ranks = [every[row[0]] for row in mesh.mesh.tolist()]
        checkpoint[LOADERS] = {"prefetched": prefetched, "ranks": ranks}
        if global_batch is not None:
            checkpoint[LOADERS]["accumulated"] = trainer.accumulate_grad_batches
        if states := [p["loader"] for p in ranks[0] if "loader" in p]:
            fit_loop["combined_loader"] = states  # for a Trainer without this package

    # ----------------------------------------------------------------------------------------------------------- loading

    def load(self, loaded: dict[str, Any], trainer: pl.Trainer, mesh: DeviceMesh, *, global_batch: int | None) -> None:
        """Take random states and positions of loaders from a checkpoint, if the run trains.

        With `global_batch` the progress of a checkpoint from another mesh is converted to this one, in place.

        Raises:
            TPError: If its progress is not a whole number of batches on this mesh.
        """
        self.positions, self.rng_at_step = [], None
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._load_rng(loaded, mesh)
        fit_loop = loaded.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
        states = fit_loop.pop("combined_loader", [])
        self.epoch_is_over = not is_mid_epoch(loaded)
        saved = loaded.get(LOADERS)
        if saved is None:  # of a Trainer without this package: it knows how many batches it has read
            progress = loaded.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
            read = progress.get("current", {}).get("ready", 0)
            self.positions = [{"read": read, "loader": state} for state in states] or [{"read": read}]
            return
        before, now = len(saved["ranks"]), mesh[DATA_PARALLEL].size()
        self.positions = _positions_of_rank(saved["ranks"], mesh.get_local_rank(DATA_PARALLEL), now)
        for position in self.positions:
            position["prefetched"] = saved["prefetched"] > 0
        if global_batch is not None and "accumulated" in saved and not self.epoch_is_over:
            self.accumulate = saved["accumulated"] * before / now
            rescale(loaded, self.positions, before, now)

    def _load_rng(self, loaded: dict[str, Any], mesh: DeviceMesh) -> None:
        state = loaded.get(RNG_STATE)
        if state is None:
            return
        if tuple(state["mesh"]) != tuple(mesh.shape):
            rank_zero_info(
                f"The checkpoint was saved on a mesh of {tuple(state['mesh'])} ranks, and this one has {tuple(mesh.shape)}: dropout of sharded "
                "activations draws other masks than an uninterrupted run."
            )
        set_shared_state(mesh, state)
        if is_mid_epoch(loaded):
            self.rng_at_step = state  # its epoch had begun: what a loader draws when it begins one was drawn before

    # ---------------------------------------------------------------------------------------------------------- resuming

    @property
    def mid_epoch(self) -> bool:
        """Whether the next loader continues an epoch."""
        return bool(self.positions) and not self.epoch_is_over

    def resumable(self, loader: Any, mesh: DeviceMesh) -> ResumableLoader:
        """Wrap a training loader so that it continues where it stood, and its position can be saved."""
        position = self.positions.pop(0) if self.positions else None
        if position is not None and not self.epoch_is_over:
            then = None if position.get("prefetched") else lambda: self.restore_rng(mesh)
            return ResumableLoader(loader, resume=position, then=then)
        return ResumableLoader(loader, resume=position, finished=True)

    def restore_rng(self, mesh: DeviceMesh) -> None:
        """Restore the random states of a checkpoint from the middle of an epoch: the loader stands where it stood, or the first step begins."""
        if self.rng_at_step is not None:
            set_shared_state(mesh, self.rng_at_step)
            self.rng_at_step = None


def is_mid_epoch(loaded: dict[str, Any]) -> bool:
    """Whether a checkpoint was saved between two batches of one epoch.

    Example:
        >>> progress = {"current": {"ready": 3}, "is_last_batch": False}
        >>> is_mid_epoch({"loops": {"fit_loop": {"epoch_loop.batch_progress": progress}}}), is_mid_epoch({})
        (True, False)
    """
    batch = loaded.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    return bool(batch.get("current", {}).get("ready") and not batch.get("is_last_batch"))


def _positions_of_rank(ranks: list[list[Position]], dp_rank: int, dp: int) -> list[Position]:
    """The positions of this data-parallel rank's loaders, from those of the ranks that saved the checkpoint."""
    if len(ranks) == dp:
        return list(ranks[dp_rank])
    if any("loader" in p for p in ranks[0]) and not all(to_bytes(ranks[0]) == to_bytes(r) for r in ranks):
        rank_zero_warn(
            f"The checkpoint has a loader state for each of {len(ranks)} data-parallel ranks, and they differ, while this run has {dp} ranks: "
            "all resume from the state of the first. Use loader states that do not depend on the rank, or resume with as many ranks."
        )
    return list(ranks[0])
