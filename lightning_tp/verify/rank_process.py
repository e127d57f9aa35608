"""The child side of `run_ranks`: a process that is one rank, runs the function and reports through files."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import io
import logging
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TextIO

import torch
import torch.distributed as dist

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class RankFailure(NamedTuple):
    """How one rank failed.

    `type_name` is the class name of the exception, or `Hang` (still running at the timeout), `Killed` (still running some
    seconds after another rank had failed), `Signal` (killed by a signal, such as a segmentation fault) or `Exit` (exited
    without a result). `traceback` is text; for a rank that was stopped, it is the stack at that time.

    Example:
        >>> RankFailure("ValueError", "boom", "Traceback ...").message
        'boom'
    """

    type_name: str
    message: str
    traceback: str


@dataclass(frozen=True)
class Report:
    """How one rank ended; `when` is on the monotonic clock, which all processes share, and `exception` is pickled."""

    value: Any = None
    failure: RankFailure | None = None
    when: float = 0.0
    exception: bytes | None = None


@dataclass(frozen=True)
class RankJob:
    """One call of `run_ranks`: its settings, and the files through which ranks report to the parent."""

    folder: Path
    world: int
    backend: str
    init: bool
    timeout: float
    port: int

    def file(self, rank: int, kind: Literal["report", "output", "stack"]) -> Path:
        """Return the file for the report of a rank, for what it prints, or for its stack if it hangs or crashes."""
        return self.folder / f"{rank}.{kind}"

    def environment(self, rank: int) -> dict[str, str]:
        """Return the variables that `torchrun` sets for a rank; without its agent, rank 0 makes the store, as with `env://`."""
        values: dict[str, object] = {
            **dict.fromkeys(("RANK", "LOCAL_RANK", "ROLE_RANK"), rank),
            **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), self.world),
            "GROUP_RANK": 0,
            "GROUP_WORLD_SIZE": 1,
            "ROLE_NAME": "default",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": self.port,
            "TORCHELASTIC_RUN_ID": self.folder.name,
            "TORCHELASTIC_RESTART_COUNT": 0,
            "TORCHELASTIC_MAX_RESTARTS": 0,
            "TORCHELASTIC_USE_AGENT_STORE": False,
            "OMP_NUM_THREADS": 1,
        }
        if sys.platform == "linux":  # else gloo looks up the host's name, which a container may not resolve
            values["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
        return {name: str(value) for name, value in values.items()}


def run_rank(job: RankJob, rank: int, call: Call | None) -> NoReturn:
    """Be a rank: run the function, write a report, and exit by `os._exit`, because a forked rank must not run its parent's exit handlers.

    Without a `call` (the function and its arguments), it is read from the job's file.
    """
    code = 1
    gc.freeze()  # what a fork inherits is never garbage here, and traversing it would copy its memory
    try:
        if hasattr(os, "setpgrp"):
            os.setpgrp()  # so that whatever this rank starts is killed with it
        _redirect_output(job.file(rank, "output"))
        with open(job.file(rank, "stack"), "w") as stack:
            _prepare(job, rank, stack)
            report, code = _run_function(job, rank, call)
            partial = job.folder / f"{rank}.partial"
            partial.write_bytes(report)
            os.replace(partial, job.file(rank, "report"))
    except BaseException:
        traceback.print_exc()  # a bug in this file: the parent sees a rank without a report, and this output
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _redirect_output(path: Path) -> None:
    """Redirect stdout and stderr of this process to a file, whether written by Python, by C++ or by a logger."""
    old = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    out, err = (os.fdopen(n, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False) for n in (1, 2))
    sys.stdout = sys.__stdout__ = out  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = err  # type: ignore[misc]
    # handlers made before the fork hold the parent's stream, which under pytest is neither 1 nor 2
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for handler in (handler for logger in loggers for handler in getattr(logger, "handlers", [])):
        if isinstance(handler, logging.StreamHandler) and any(handler.stream is stream for stream in old):
            handler.setStream(sys.stderr)


def _prepare(job: RankJob, rank: int, stack: TextIO) -> None:
    """Use one thread, dump the stack on SIGUSR1 and on a crash, and end after the timeout even if the parent is gone."""
    torch.set_num_threads(1)
    faulthandler.disable()  # that of the parent; enabling it again would not restore a handler that something has replaced
    faulthandler.enable(stack)
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(job.timeout) + 60)
    rank_zero = sys.modules.get("lightning_utilities.core.rank_zero")
    if rank_zero is not None:  # it reads the rank from the environment at import, which was before the fork
        rank_zero.rank_zero_only.rank = rank


def _run_function(job: RankJob, rank: int, call: Call | None) -> tuple[bytes, int]:
    """Run the function in its process group; return the pickled report and the exit code."""
    try:
        if gpu := "nccl" in job.backend:
            torch.cuda.set_device(rank)
        # arguments on a GPU come to that of the rank
        fn, args, kwargs = call or torch.load(job.folder / "call.pt", _place_of(rank) if gpu else None, weights_only=False)
        if job.init:
            dist.init_process_group(
                job.backend,
                init_method=f"file://{job.folder / 'store'}",
                rank=rank,
                world_size=job.world,
                timeout=timedelta(seconds=job.timeout + 60),  # the parent times out first, and says where the rank hangs
            )
            if "gloo" in job.backend:
                dist.barrier()  # a function that ends soon would close connections that another rank is still opening
        try:
            value = fn(*args, **kwargs)
        except SystemExit as end:
            if end.code not in (None, 0):
                raise
            value = None
        try:
            report = _pickled(Report(value, when=time.monotonic()))
        except Exception as error:
            raise TypeError(f"rank {rank} returned a {type(value).__name__} that does not pickle: {error}") from error
        if dist.is_initialized():
            dist.destroy_process_group()
        return report, 0
    except BaseException as error:
        when = time.monotonic()
        trace = error.__traceback__ and error.__traceback__.tb_next  # from `fn` on, without the frame of this function
        text = "".join(traceback.format_exception(type(error), error, trace))
        failure = RankFailure(type(error).__name__, str(error), text)
        return _pickled(Report(failure=failure, when=when, exception=_pickled_exception(error))), 1


def _place_of(rank: int) -> Callable[[Any, str], Any]:
    """Return the `map_location` of a rank with a GPU."""
    return lambda storage, location: storage if location == "cpu" else storage.cuda(rank)


def _pickled(report: Report) -> bytes:
    buffer = io.BytesIO()
    torch.save(report, buffer, pickle_protocol=pickle.HIGHEST_PROTOCOL)
    return buffer.getvalue()


def _pickled_exception(error: BaseException) -> bytes | None:
    """Return the exception as bytes, or None if it does not pickle and unpickle."""
    try:
        data = pickle.dumps(error)
        return data if type(pickle.loads(data)) is type(error) else None
    except Exception:
        return None
