"""Ranks that are started from one process and end before the next line runs: what a notebook needs.

Lightning's own launcher, beside which a script is started once for each rank (`python train.py`), or ranks are found (torchrun, SLURM).
What comes back to the process that started them is what Lightning's `ddp_notebook` brings: metrics, results, and the weights, whole; and how
far the run has come.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher, _WorkerOutput
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.multiprocessing import ProcessRaisedException
from typing_extensions import override

from lightning_tp.errors import HEAD_START, TPError
from lightning_tp.shards.state_dict import full_state_dict

LAST_WORDS = 30.0  # seconds that a process waits for the ranks it has started, once it has come to its own end


def end_with_children(launcher: Any) -> None:
    """Let a process that has started the other ranks (`python train.py`) end after them, and with status 1 if one of them has failed.

    Lightning's launcher ends without looking; so a rank that failed last of all (in `on_fit_end`, say) was not seen in the status. And its
    thread, which looks every 5 s, kills all ranks the moment it finds one dead: they are left time to say which one that was.
    """
    children = getattr(launcher, "procs", None)
    if children and not hasattr(launcher, "_tp_children"):
        launcher._tp_children = children
        atexit.register(_end_with, children)
        for thread in threading.enumerate():
            if getattr(thread, "_child_processes", None) is children:
                thread._terminate_all = partial(_after_their_words, thread._terminate_all)  # type: ignore[attr-defined]


def _after_their_words(terminate: Callable[[], None]) -> None:
    time.sleep(HEAD_START)
    terminate()


def _end_with(children: list[subprocess.Popen[Any]]) -> None:
    failed = getattr(sys, "last_value", None) is not None
    until = time.monotonic() + (2 * HEAD_START if failed else LAST_WORDS)
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, until - time.monotonic()))
        if failed and child.returncode is None:
            child.kill()
    if any(child.returncode for child in children):  # None: it still works, and this one has come to its end
        if not failed:
            sys.stderr.write("[rank 0] ends with status 1, since another rank has failed\n")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


class ProcessLauncher(_MultiProcessingLauncher):
    """Lightning's, for ranks that hold shards: the weights that come back are whole, and an error of ours is seen as itself."""

    _results: Any = None

    @override
    def launch(self, *args: Any, **kwargs: Any) -> Any:
        refuse_used_cuda(self._strategy, self._start_method)
        try:
            super().launch(*args, **kwargs)
        except ProcessRaisedException as error:
            if own := own_error(error):
                raise own from None
            raise
        results, self._results = self._results, None
        return results

    @override
    def _wrapping_function(self, *args: Any, **kwargs: Any) -> None:
        one_thread(self._start_method)
        super()._wrapping_function(*args, **kwargs)

    @override
    def _collect_rank_zero_results(self, trainer: pl.Trainer, results: Any) -> _WorkerOutput | None:
        trained = None
        if trainer.state.fn == TrainerFn.FITTING:  # every rank takes part
            progress = trainer.fit_loop.state_dict()
            progress["state_dict"].pop("combined_loader", None)  # of loaders that end with the ranks
            trained = full_state_dict(trainer.lightning_module), progress
        if self._strategy.local_rank != 0:
            return None
        best = getattr(trainer.checkpoint_callback, "best_model_path", None)
        return _WorkerOutput(best, to_file((trained, results)), trainer.state, None, self.get_extra_results(trainer))

    @override
    def _recover_results_in_main_process(self, worker_output: _WorkerOutput, trainer: pl.Trainer) -> None:
        trained, self._results = from_file(worker_output.weights_path)
        if trained is not None:
            weights, progress = trained
            copy_weights_back(trainer.lightning_module, weights)
            trainer.fit_loop.load_state_dict(progress)  # `trainer.global_step`, and what `save_checkpoint` writes
        super()._recover_results_in_main_process(worker_output._replace(weights_path=None), trainer)


def refuse_used_cuda(strategy: Any, method: str) -> None:
    """Say it here, where the mistake is: torch raises in the forked ranks, and Lightning's own check sees nothing before.

    Raises:
        TPError: if ranks that use GPUs are to be forked from a process that has used them.
    """
    if method == "fork" and strategy.parallel_devices[0].type == "cuda" and torch.cuda.is_initialized():
        raise TPError(
            "This process has used a GPU already, and ranks that are forked from it could not use theirs. Restart the notebook's kernel, and leave "
            "the GPUs to the Trainer: no `.cuda()`, no `torch.cuda.memory_allocated()` and the like before `fit`. Data and model stay on the CPU."
        )


def one_thread(method: str) -> None:
    """Let a forked rank compute with one thread: the pool of a process that has computed with several before is gone after a fork, and the
    first operation that asks for it waits for ever."""
    if method == "fork":
        os.environ["OMP_NUM_THREADS"] = "1"  # Lightning then leaves it
        torch.set_num_threads(1)


def to_file(results: Any) -> Path:
    """Write what comes back where the other process finds it: a queue would hand it memory of a process that has ended."""
    path = Path(tempfile.mkdtemp()) / "results.pt"
    torch.save(results, path)
    return path


def from_file(path: Any) -> Any:
    """Read what `to_file` has written, onto the CPU, and remove it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=False)  # our own
    finally:
        shutil.rmtree(Path(path).parent)


def own_error(error: ProcessRaisedException) -> TPError | None:
    """The `TPError` that ended a rank, if it was one."""
    mark = f"\n{TPError.__module__}.{TPError.__name__}: "
    text = str(error)
    return TPError(text.rpartition(mark)[2].strip()) if mark in text else None


def copy_weights_back(module: torch.nn.Module, whole: dict[str, torch.Tensor]) -> None:
    """Put weights that came back from the ranks into the module of the process that started them."""
    on_meta = any(p.is_meta for p in module.parameters())
    lost = module.load_state_dict(whole, strict=False, assign=on_meta).unexpected_keys
    if lost:  # made in `configure_model`, which has run on the ranks only
        rank_zero_warn(
            f"{len(lost)} of {len(whole)} trained weights (`{lost[0]}`, ..) have no place in the module of this process: they were made on the "
            "ranks. Make them in `__init__`, or load a checkpoint."
        )
