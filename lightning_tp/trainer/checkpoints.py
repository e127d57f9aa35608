"""Save, find and load the checkpoints of a strategy, as sharded folders or in one file, at once or in the background."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_tp import checkpoint as checkpoints
from lightning_tp.checkpoint import Background, HostCopy, Manifest, Peers, SaveContent, StoragePath
from lightning_tp.checkpoint.single_file import save_single_file
from lightning_tp.checkpoint.weights.dcp_folder import model_key
from lightning_tp.errors import TPError
from lightning_tp.plan.checked import CheckedPlan
from lightning_tp.shards import optimizer_state
from lightning_tp.shards.state_dict import full_state_dict
from lightning_tp.trainer.module_plan import applied_plan
from lightning_tp.trainer.patches import private
from lightning_tp.trainer.patches.replaced import replaced
from lightning_tp.trainer.resume import restore_trainable

Options = dict[str, Any]  # of `checkpoint.load`: safe_globals, weights_only
OnSaveError = Literal["raise", "warn"]
Saving = Literal["sharded", "streamed", "gathered"]  # a folder; a file, tensor by tensor; a file, after all of it is on rank 0


class CheckpointWriter:
    """Write checkpoints one at a time, while training waits or in the background; if one can't be written, raise or warn."""

    def __init__(self, *, background: bool, on_error: OnSaveError = "raise") -> None:
        self.background = background
        self.on_error = on_error
        self.failed = False  # the last one: what it would have replaced is kept
        self._thread, self._host_copy = Background(), HostCopy()

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written, or was, and `finish` has not been called since."""
        return self._thread.busy

    def peers(self) -> Peers:
        """The ranks, with a process group of their own for saving in the background. A collective."""
        return Peers(checkpoints.group_for_saving() if self.background else None)

    def snapshot(self, tree: Any) -> Any:
        """Copy tensors to host memory if they are written in the background, where training would change them."""
        return self._host_copy.copy(tree) if self.background else tree

    def write(self, place: StoragePath, work: Callable[[], None], *, wait: bool = False) -> None:
        """Write a checkpoint by calling `work`; with `wait`, return only once it is written. In the background, an error is raised by `finish`."""
        self.failed = False
        if not self.background:
            try:
                work()
            except TPError as error:
                self._could_not_write(error)
            return
        self._thread.start(f"Saving `{place}`", work)
        if wait:
            self.finish()

    def finish(self, *, only_warn: bool = False) -> None:
        """Wait until nothing is being written; with `only_warn`, since the run has failed already, an error is a warning."""
        try:
            self._thread.wait()
        except TPError as error:
            if only_warn:
                rank_zero_warn(str(error))
            else:
                self._could_not_write(error)

    def _could_not_write(self, error: TPError) -> None:
        self.failed = True
        if self.on_error == "raise":
            raise error
        rank_zero_warn(f"{error} Training continues without it.")

    def remove(self, place: StoragePath) -> None:
        """Remove a checkpoint, once the one that replaces it is written; not at all if that failed."""
        if not self.failed:
            self._thread.after(lambda: checkpoints.remove(place))


def content_of(checkpoint: dict[str, Any], mesh: dict[str, int], plan: CheckedPlan | None, *, first_rank: bool) -> SaveContent:
    """Sort what `Trainer.save_checkpoint` has collected, which is emptied, into what is sharded and what rank 0 writes."""
    step, epoch = int(checkpoint.get("global_step", 0)), int(checkpoint.get("epoch", 0))
    manifest = Manifest(step, epoch, mesh, checkpoints.versions(), weights_only="optimizer_states" not in checkpoint)
    sharded = {"state_dict": checkpoint.pop("state_dict")}
    sharded |= {f"optimizer_{i}": state for i, state in enumerate(checkpoint.pop("optimizer_states", []))}
    apart: dict[str, Any] = {}  # DTensors elsewhere: in the states of callbacks
    for key in list(checkpoint):
        checkpoint[key] = checkpoints.without_dtensors(checkpoint[key], apart, key)
    rest = checkpoints.to_bytes(checkpoint) if first_rank else None
    return SaveContent(sharded, apart, rest, plan.to_json() if plan is not None and first_rank else None, manifest)


def weights_to_save(module: nn.Module, saving: Saving) -> dict[str, Any]:
    """The weights of a split module for a checkpoint: DTensors; or, to be gathered, full tensors on rank 0 and nothing elsewhere."""
    if saving != "gathered":
        return module.state_dict()
    full = full_state_dict(module)
    if type(module).state_dict is not nn.Module.state_dict:  # its own, which may leave out what is frozen
        full = {name: full.get(name, value) for name, value in module.state_dict().items()}
    return full if Peers().rank == 0 else {}


def optimizer_to_save(optimizer: Optimizer, saving: Saving) -> dict[str, Any]:
    """The state of an optimizer for a checkpoint, likewise."""
    if saving != "gathered":
        return optimizer_state.optimizer_state(optimizer)
    full = optimizer_state.full_optimizer_state(optimizer)
    return full if Peers().rank == 0 else {}


def save_trainer_checkpoint(checkpoint: dict[str, Any], place: StoragePath, saving: Saving, strategy: Any, *, wait: bool) -> None:
    """Save what `Trainer.save_checkpoint` has collected, with weights and optimizer states as `saving` wants them. A collective."""
    writer: CheckpointWriter = strategy.checkpoint_writer
    if saving == "sharded":
        plan = applied_plan(strategy.lightning_module)
        content = content_of(checkpoint, strategy.mesh_sizes_by_axis, plan, first_rank=strategy.is_global_zero)
        content.sharded, content.apart = writer.snapshot((content.sharded, content.apart))
        work = partial(checkpoints.save_folder, place, content, writer.peers())
    elif saving == "streamed":
        work = partial(save_single_file, checkpoint, place)
    else:
        if writer.background:  # weights and states of optimizers are copies already
            fresh = {k: checkpoint.pop(k) for k in ("state_dict", "optimizer_states") if k in checkpoint}
            checkpoint = copy.deepcopy(checkpoint) | fresh
        one_file = partial(write_one_file, checkpoint, place, strategy.checkpoint_io)
        work = partial(writer.peers().from_first, one_file)
    writer.write(place, work, wait=wait)


def write_one_file(checkpoint: dict[str, Any], place: StoragePath, io: CheckpointIO) -> None:
    """Write a checkpoint of full tensors into one file, by the user's CheckpointIO if there is one."""
    if type(io) is TorchCheckpointIO:
        checkpoints.save_file(place, lambda stream: torch.save(checkpoint, stream))
    else:
        io.save_checkpoint(checkpoint, place.url, place.options)


@dataclass
class RequestedCheckpoint:
    """How a Trainer was asked for a checkpoint: `fit(ckpt_path=.., weights_only=..)`."""

    word: str | None = None  # "last", "best" or "hpc": then another checkpoint may be loaded instead of a damaged one
    weights_only: bool | None = None

    def find(self, trainer: pl.Trainer, asked: Any, found: Any) -> Any:
        """Find the checkpoint for `ckpt_path=asked`, where Lightning has found one, or None; "last" even if the run ended before naming it so."""
        self.word = asked if asked in ("last", "best", "hpc") else None
        if asked is None and found is not None:  # by a callback or SLURM, or an evaluation after training
            self.word = "last" if trainer.state.fn == TrainerFn.FITTING else "best"
        if asked != "last":
            return found
        callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.save_last]
        folders = [StoragePath(private.checkpoint_folder(c, trainer)) for c in callbacks]
        for folder in folders:
            for name in checkpoints.recoverable(folder):
                if name.startswith(ModelCheckpoint.CHECKPOINT_NAME_LAST):
                    return (folder / name).url
        if found is not None:
            place = StoragePath(found)
            ours = any(folder.path == place.parent.path for folder in folders)
            return checkpoints.newer(place).url if ours else found
        return next((place.url for folder in folders for place in checkpoints.candidates(folder)), None)

    def select(self, trainer: pl.Trainer, path: str) -> StoragePath:
        """Select the checkpoint at a path; if it is damaged and was asked for by a word, the newest intact one, else `TPError`. A collective."""
        word, self.word = self.word, None
        instead: list[str] | None = None if word is None else []
        callback = trainer.checkpoint_callback
        if word == "best" and isinstance(callback, ModelCheckpoint):
            scores = callback.best_k_models
            instead = sorted(scores, key=lambda p: float(scores[p]), reverse=callback.mode == "max")
        place, message = checkpoints.select_intact(StoragePath(path), Peers(), instead=instead)
        if message is not None:
            rank_zero_warn(f"`ckpt_path={word!r}`: {message}")
            private.set_ckpt_path(trainer, place.url)
        return place


def load_trainer_checkpoint(place: StoragePath, trainer: pl.Trainer, *, keep_weights: bool, options: Options) -> dict[str, Any]:
    """Load weights and, in training, optimizer states of a Trainer's checkpoint, a folder or a file, and return the rest. A collective.

    With `keep_weights` also these, at which a callback that averages weights looks. `TPError` if it does not fit, or is of no Trainer.
    """
    load = _load_file if place.is_file() else _load_folder
    return load(place, trainer, keep_weights, options)


def _optimizers_to_load(trainer: pl.Trainer, loaded: dict[str, Any]) -> list[Optimizer]:
    """The optimizers, with the groups that they had; none in a validation after training, though the strategy still has them."""
    if trainer.state.fn != TrainerFn.FITTING:
        return []
    restore_trainable(trainer, loaded)
    return trainer.strategy.optimizers


def _load_file(place: StoragePath, trainer: pl.Trainer, keep_weights: bool, options: Options) -> dict[str, Any]:
    loaded: dict[str, Any] = checkpoints.load(place, mmap=True, **options)
    load_full_weights(trainer.lightning_module, loaded, place, strict=trainer.lightning_module.strict_loading)
    if not keep_weights:
        del loaded["state_dict"]
    optimizers = _optimizers_to_load(trainer, loaded)
    states = loaded.get("optimizer_states", ())
    if len(states) < len(optimizers):
        raise TPError(
            f"`{place}` has {len(states)} optimizer state(s) and the module {len(optimizers)} optimizer(s), so training can't resume from it: it "
            "was saved with weights only, or by another module. Weights alone can be loaded by `trainer.validate`, `test` and `predict`, and "
            "by `load_from_checkpoint`."
        )
    for optimizer, state in zip(optimizers, states, strict=False):
        optimizer_state.load_optimizer_state(optimizer, state)
    return loaded


def _load_folder(place: StoragePath, trainer: pl.Trainer, keep_weights: bool, options: Options) -> dict[str, Any]:
    module = trainer.lightning_module
    rest: dict[str, Any] = checkpoints.load(place / "meta.pt", **options)
    key = model_key(checkpoints.read_metadata(place).state_dict_metadata) or "state_dict"  # "model": of FSDPStrategy
    checkpoints.load_model(module, place, strict=module.strict_loading, key=key)
    for i, optimizer in enumerate(_optimizers_to_load(trainer, rest)):
        checkpoints.load_optimizer(optimizer, place, f"optimizer_{i}", **options)
    rest = checkpoints.with_dtensors(rest, place, module)
    if keep_weights:
        rest["state_dict"] = module.state_dict()
    return rest


def load_full_weights(module: nn.Module, loaded: Any, place: StoragePath, *, strict: bool) -> None:
    """Load the full tensors of a checkpoint in one file into a split module; each rank keeps its shards. `TPError` if they do not fit."""
    if not isinstance(loaded, dict) or not isinstance(loaded.get("state_dict"), dict):
        what = "a dict without `state_dict`" if isinstance(loaded, dict) else f"a {type(loaded).__name__}"
        raise TPError(f"`{place}` is not a checkpoint of a Trainer: it contains {what}.")
    found = module.load_state_dict(loaded["state_dict"], strict=False)
    if not strict:
        return
    for names, has, end in ((found.missing_keys, "has no", ""), (found.unexpected_keys, "has", ", which the model does not have")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise TPError(f"`{place}` {has} `{names[0]}`{more}{end}. Set `strict_loading = False`, or use the model that saved it.")


@contextmanager
def lightning_loads_safely(options: Options) -> Iterator[None]:
    """While this lasts, let Lightning's own loading of sharded checkpoints unpickle only what `safe_globals` allows."""

    def load(own: Any, state: dict[str, Any], checkpoint_id: Any) -> None:
        checkpoints.dcp_load(state, StoragePath(checkpoint_id), **options)

    with replaced(dcp, "load", load), torch.serialization.safe_globals(options["safe_globals"]):
        yield
