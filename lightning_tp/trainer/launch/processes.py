"""The launchers of this package: by the script itself, by fork or spawn, or none where torchrun or SLURM has started the ranks.

Forked and spawned ranks end before the next line of a notebook runs. What comes back to the process that started them is what Lightning's
`ddp_notebook` brings back (metrics, results, weights), with full weights, and the progress of the loops.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.multiprocessing import ProcessRaisedException
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from lightning_tp.core.ops.split_logits import SplitLogits
from lightning_tp.errors import HEAD_START, TPError
from lightning_tp.shards.state_dict import full_state_dict
from lightning_tp.trainer.patches import private
from lightning_tp.trainer.patches.replaced import replace
from lightning_tp.trainer.patches.run import checkpoint_path_found_by

CHILDREN_MAY_TAKE = 30.0  # seconds that a process waits for the ranks it has started, once it has come to its own end


def trainer_launcher(strategy: Any, method: str) -> Any:
    """Make the launcher of a Trainer for "external" (the ranks run already), "popen" (the script runs once for each), "fork" or "spawn"."""
    if method == "external":
        return ExternalLauncher(strategy)
    return ScriptLauncher(strategy) if method == "popen" else ProcessLauncher(strategy, start_method=method)


class ExternalLauncher(private.Launcher):
    """The launcher of ranks that torchrun, SLURM and the like have started: it starts none."""

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy

    @property
    @override
    def is_interactive_compatible(self) -> bool:
        return True

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        with checkpoint_path_found_by(self.strategy, trainer, function, args, kwargs):
            return function(*args, **kwargs)

    @override
    def kill(self, signum: Any) -> None:
        """Kill none: whoever has started the ranks ends them."""


class ScriptLauncher(private.ScriptLauncher):
    """Lightning's launcher, which runs the script for each other rank of this machine."""

    def __init__(self, strategy: Any) -> None:
        super().__init__(strategy.cluster_environment, strategy.num_processes, strategy.num_nodes)
        self.strategy = strategy

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        with checkpoint_path_found_by(self.strategy, trainer, function, args, kwargs):
            return super().launch(function, *args, trainer=trainer, **kwargs)


class ForkOrSpawnMixin:
    """Fork or spawn ranks: GPUs that are in use already are refused, and a `TPError` of a rank is raised as itself."""

    def __init__(self, strategy: Any, start_method: Any) -> None:
        super().__init__(strategy, start_method)  # type: ignore[call-arg]
        self.strategy, self.start_method = strategy, start_method

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Start the ranks, and wait for them."""
        refuse_used_cuda(self.strategy, self.start_method)
        with errors_of_ranks_raised():
            return super().launch(*args, **kwargs)  # type: ignore[misc]

    def _wrapping_function(self: Any, *args: Any) -> None:
        if self.start_method == "fork":  # which copies no thread pool: the first operation that uses several threads would hang
            os.environ["OMP_NUM_THREADS"] = "1"  # Lightning then leaves it
            torch.set_num_threads(1)
        super()._wrapping_function(*args)  # type: ignore[misc]


class AskedToEnd:
    """The result of a run that a signal has ended on all ranks: the process that started them waits for one, and then ends likewise."""


def _result_of(function: Callable[..., Any], trainer: pl.Trainer, *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except SIGTERMException:
        private.tear_down(trainer)
        return AskedToEnd()


class ProcessLauncher(ForkOrSpawnMixin, private.MultiProcessingLauncher):
    """Lightning's launcher, for ranks that hold shards: full weights come back."""

    results: Any = None  # of a run, while they are on their way back

    @override
    def launch(self, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        super().launch(*args, trainer=trainer, **kwargs)
        results, self.results = self.results, None
        if isinstance(results, AskedToEnd):
            private.set_received_sigterm(trainer)
            raise SIGTERMException
        return results

    @override
    def _wrapping_function(self, process_idx: int, trainer: Any, function: Any, args: Any, kwargs: Any, *queue: Any) -> None:
        with checkpoint_path_found_by(self.strategy, trainer, function, args, kwargs):
            super()._wrapping_function(process_idx, trainer, partial(_result_of, function, trainer), args, kwargs, *queue)

    @override
    def _collect_rank_zero_results(self, trainer: pl.Trainer, results: Any) -> private.WorkerOutput | None:
        trained = None
        if trainer.state.fn == TrainerFn.FITTING:  # every rank takes part
            progress = trainer.fit_loop.state_dict()
            progress["state_dict"].pop("combined_loader", None)  # of loaders that end with the ranks
            trained = full_state_dict(trainer.lightning_module), progress
        if self.strategy.local_rank != 0:
            return None
        best = getattr(trainer.checkpoint_callback, "best_model_path", None)
        file = write_results((trained, results))
        return private.WorkerOutput(best, file, trainer.state, None, self.get_extra_results(trainer))

    @override
    def _recover_results_in_main_process(self, worker_output: private.WorkerOutput, trainer: pl.Trainer) -> None:
        trained, self.results = read_results(worker_output.weights_path)
        if trained is not None:
            weights, progress = trained
            copy_weights_back(trainer.lightning_module, weights)
            trainer.fit_loop.load_state_dict(progress)  # `trainer.global_step`, and what `save_checkpoint` writes
        super()._recover_results_in_main_process(worker_output._replace(weights_path=None), trainer)


def fabric_launcher(strategy: Any, method: str) -> Any:
    """Make the launcher of a Fabric, likewise; None where the ranks run already."""
    if method == "external":
        return None
    if method == "popen":
        return private.FabricScriptLauncher(strategy.cluster_environment, strategy.num_processes, strategy.num_nodes)
    return FabricProcessLauncher(strategy, start_method=method)


class FabricProcessLauncher(ForkOrSpawnMixin, private.FabricMultiProcessingLauncher):
    """Fabric's launcher, for ranks that hold shards: the results come back with full logits."""

    @override
    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return read_results(super().launch(partial(_write_results_of, function), *args, **kwargs))


def _write_results_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Path | None:
    results = tree_map_only(SplitLogits, lambda logits: logits.full_tensor(), function(*args, **kwargs))  # every rank takes part
    return write_results(results) if int(os.environ["LOCAL_RANK"]) == 0 else None


def refuse_used_cuda(strategy: Any, method: str) -> None:
    """Refuse to fork ranks that use GPUs from a process that has used them: torch would raise in the ranks, far from the mistake."""
    if method == "fork" and strategy.parallel_devices[0].type == "cuda" and torch.cuda.is_initialized():
        raise TPError(
            "This process has used a GPU already, and ranks that are forked from it could not use theirs. Restart the notebook's kernel, and leave "
            "the GPUs to the Trainer: no `.cuda()`, no `torch.cuda.memory_allocated()` and the like before `fit`. Data and model stay on the CPU."
        )


@contextlib.contextmanager
def errors_of_ranks_raised() -> Iterator[None]:
    """Raise the `TPError` that ended a rank, where torch raises an error with its traceback as text."""
    try:
        yield
    except ProcessRaisedException as error:
        mark = f"\n{TPError.__module__}.{TPError.__name__}: "
        if mark not in str(error):
            raise
        raise TPError(str(error).rpartition(mark)[2].strip()) from None


def write_results(results: Any) -> Path:
    """Write results to a file for the process that started this one: a queue would pass on memory of a process that has ended."""
    path = Path(tempfile.mkdtemp()) / "results.pt"
    torch.save(results, path)
    return path


def read_results(path: Any) -> Any:
    """Read what `write_results` has written, onto the CPU, and remove the file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=False)  # our own
    finally:
        shutil.rmtree(Path(path).parent)


def copy_weights_back(module: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copy full weights that came back from the ranks into the module of the process that started them."""
    on_meta = any(p.is_meta for p in module.parameters())
    lost = module.load_state_dict(weights, strict=False, assign=on_meta).unexpected_keys
    if lost:  # made in `configure_model`, which has run on the ranks only
        rank_zero_warn(
            f"{len(lost)} of {len(weights)} trained weights (`{lost[0]}`, ..) have no place in the module of this process: they were made on the "
            "ranks. Make them in `__init__`, or load a checkpoint."
        )


def end_with_children(launcher: Any) -> None:
    """Let a process that has started the other ranks (`python train.py`) end after them, and with status 1 if one of them has failed.

    Lightning's launcher ends without waiting, so a rank that fails last of all (in `on_fit_end`, say) would not show in the exit status. And its
    thread, which looks every 5 s, kills all ranks as soon as it finds one dead; here they get time to report which one that was.
    """
    children = getattr(launcher, "procs", None)
    if not children or hasattr(launcher, "_tp_children"):
        return
    launcher._tp_children = children
    atexit.register(_end_with, children)
    for thread in threading.enumerate():
        if private.watched_processes(thread) is children:
            replace(thread, "_terminate_all", _after_head_start)


def _after_head_start(terminate: Callable[[], None]) -> None:
    time.sleep(HEAD_START)
    terminate()


def _end_with(children: list[subprocess.Popen[Any]]) -> None:
    failed = getattr(sys, "last_value", None) is not None
    until = time.monotonic() + (2 * HEAD_START if failed else CHILDREN_MAY_TAKE)
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, until - time.monotonic()))
        if failed and child.returncode is None:
            child.kill()
    if any(child.returncode for child in children):  # None: it still works, and this one has come to its end
        if not failed:
            sys.stderr.write("[rank 0] exits with status 1, because another rank has failed\n")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
