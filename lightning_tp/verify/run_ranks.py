"""Run a function in several real processes of one machine: the parent side, which starts the ranks, waits, and collects.

`run_ranks` starts one process per rank with the environment of `torchrun` and a gloo process group, and returns the results, or
raises the error of the rank that failed first. How they start is decided in `start_method.py`. It covers one machine only and is no
launcher for training: a Lightning `Trainer` inside (with `init=False`) detects `TorchElasticEnvironment` and launches nothing.

It is written here because torch's own launchers have no way to return results, to name a rank that hangs with its stack, or to run
a closure.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import random
import re
import signal
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, overload
from unittest.mock import patch

import torch
import torch.distributed as dist

from lightning_tp.errors import TPError
from lightning_tp.verify.rank_process import Call, RankFailure, RankJob, Report, run_rank
from lightning_tp.verify.start_method import default_start_method, pickled, refuse_broken_fork

T = TypeVar("T")

_GRACE = 5.0  # seconds that the other ranks get to end after one has failed
_DUMP = 0.5  # seconds that a hanging rank gets to write its stack before it is killed
_DIED_BEFORE = 0.5  # a rank that died without a report was dead at most this long before the parent noticed


class RankError(RuntimeError):
    """The failure of at least one rank of `run_ranks`; the message is that of the rank that failed first in time.

    If the original exception pickles, it is the `__cause__` of this one.

    Attributes:
        rank: The rank that failed first. If all that failed hang, the lowest of them.
        errors: `RankFailure(type_name, message, traceback)` of each rank that failed.
        output: What each rank printed, stdout and stderr together, as one text.

    Example:
        >>> def fail():
        ...     raise ValueError("boom")
        >>> try:
        ...     run_ranks(fail, 2)
        ... except RankError as error:
        ...     error.errors[error.rank].message
        'boom'
    """

    def __init__(self, message: str, *, rank: int, errors: dict[int, RankFailure], output: dict[int, str]) -> None:
        super().__init__(message)
        self.rank = rank
        self.errors = errors
        self.output = output


@overload
def run_ranks(fn: Callable[..., T], world: int, *args: Any, return_output: Literal[False] = ..., **kwargs: Any) -> list[T]: ...


@overload
def run_ranks(fn: Callable[..., T], world: int, *args: Any, return_output: Literal[True], **kwargs: Any) -> list[tuple[T, str]]: ...


def run_ranks(
    fn: Callable[..., T],
    world: int,
    *args: Any,
    timeout: float = 120.0,
    start_method: Literal["fork", "spawn"] | None = None,
    backend: str = "gloo",
    init: bool = True,
    return_output: bool = False,
    **kwargs: Any,
) -> list[T] | list[tuple[T, str]]:
    """Run `fn(*args, **kwargs)` in `world` processes and return their results in rank order.

    Each process has the environment variables that `torchrun` sets, one thread, and (unless `init=False`) a default process group. With fork,
    `fn` may be a lambda or a closure; with spawn, it must be importable, as its arguments. Results are pickled; tensors come back on the CPU.

    A process that has used a GPU, or run a backward pass on a machine with GPUs, can't be forked into ranks that do the same.
    There, ranks are spawned where `fn` is importable; others are forked, and may do the rest.

    Args:
        fn: The function. It learns its rank from `torch.distributed.get_rank()` or `os.environ["RANK"]`.
        world: Number of ranks.
        *args: Positional arguments of `fn`.
        timeout: Seconds until all ranks are killed and those still running are named as hanging.
        start_method: `fork` or `spawn`. Default: fork on Linux, unless that leaves ranks without GPUs or backward passes.
        backend: Backend of the process group; `nccl` also makes `cuda:LOCAL_RANK` the current device.
        init: Make the process group. Pass `False` if `fn` makes it, as a Lightning `Trainer` does.
        return_output: Return `(result, output)` per rank, where output is what it printed to stdout and stderr.
        **kwargs: Keyword arguments of `fn`; for one named like an argument above use `functools.partial`.

    Raises:
        RankError: If a rank raised, exited with a nonzero code, died, or hung. The others get 5 s to end.
        TPError: For a world below 1, a fork in a process group or without what ranks need, or a function that can't be spawned.

    Example:
        >>> def total(x):
        ...     x = x + dist.get_rank()
        ...     dist.all_reduce(x)
        ...     return x
        >>> run_ranks(total, 2, torch.zeros(2))
        [tensor([1., 1.]), tensor([1., 1.])]
    """
    if world < 1:
        raise TPError(f"`run_ranks(world={world})`: pass a number of ranks, 1 or more.")
    call = (fn, args, kwargs)
    method = start_method or default_start_method(call, backend)
    if method == "fork" and dist.is_initialized():
        raise TPError(
            f"`run_ranks` cannot fork {world} ranks while this process is in a process group of {dist.get_world_size()}: they would inherit its "
            "sockets. Call `torch.distributed.destroy_process_group()` first, or pass `start_method='spawn'`."
        )
    with tempfile.TemporaryDirectory(prefix="run_ranks-", ignore_cleanup_errors=True) as folder:
        job = RankJob(Path(folder), world, backend, init, timeout, _free_port())
        reports = _run(job, method, call)
        outputs = [_read(job.file(rank, "output")) for rank in range(world)]
    if failures := [report.failure for report in reports if report.failure]:
        refuse_broken_fork(failures)
        _raise_first(job, reports, outputs)
    values = [report.value for report in reports]
    return list(zip(values, outputs)) if return_output else values


def _run(job: RankJob, method: str, call: Call) -> list[Report]:
    """Start the ranks, wait for them, stop those that are late, and read or write their reports."""
    context = multiprocessing.get_context(method)
    if method == "spawn":  # not through Process(args=...), which would put tensors into shared memory
        (job.folder / "call.pt").write_bytes(pickled(call))
    processes: dict[int, BaseProcess] = {}
    try:
        for rank in range(job.world):
            args = (job, rank, call if method == "fork" else None)
            process = context.Process(target=run_rank, args=args, name=f"rank{rank}")  # type: ignore[attr-defined]
            with patch.dict(os.environ, job.environment(rank)), warnings.catch_warnings():
                # Python 3.12 warns of a fork beside threads; torch mends its own state in a child
                warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
                process.start()
            processes[rank] = process
        ended, late = _wait(processes, job.timeout)
        _dump_stacks(processes, late)
    finally:
        codes = {rank: _stop(process) for rank, process in processes.items()}
    failed = any(code != 0 for rank, code in codes.items() if rank not in late)
    return [_report(job, rank, codes[rank], ended.get(rank), killed=failed) for rank in range(job.world)]


def _wait(processes: Mapping[int, BaseProcess], timeout: float) -> tuple[dict[int, float], list[int]]:
    """Wait for all ranks, but only `_GRACE` seconds once one has failed; return when each ended, and which still run."""
    ended: dict[int, float] = {}
    limit = time.monotonic() + timeout
    while len(ended) < len(processes):
        running = [rank for rank in processes if rank not in ended]
        left = limit - time.monotonic()
        if left <= 0:
            return ended, running
        # children of a rank may hold its sentinel open, so look at the process every quarter of a second
        wait_for_any([processes[rank].sentinel for rank in running], timeout=min(left, 0.25))
        for rank in running:
            if not processes[rank].is_alive():
                ended[rank] = time.monotonic()
                if processes[rank].exitcode != 0:
                    limit = min(limit, ended[rank] + _GRACE)
    return ended, []


def _dump_stacks(processes: Mapping[int, BaseProcess], late: list[int]) -> None:
    """Let each late rank write its stack into its file."""
    if not late or not hasattr(signal, "SIGUSR1"):
        return
    for rank in late:
        with contextlib.suppress(ProcessLookupError):
            os.kill(processes[rank].pid or 0, signal.SIGUSR1)
    time.sleep(_DUMP)


def _stop(process: BaseProcess) -> int | None:
    """Kill the process, if it still runs, and all processes that it started; return its exit code."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid or 0, signal.SIGKILL)
    process.kill()
    process.join()
    code = process.exitcode
    process.close()
    return code


def _report(job: RankJob, rank: int, code: int | None, ended: float | None, killed: bool) -> Report:
    """Read the report of a rank, or write that of a rank that could not."""
    stack = _read(job.file(rank, "stack"))
    if ended is None:
        text = "killed because another rank had failed" if killed else f"did not finish within {job.timeout:g} s"
        if frame := _innermost(stack):
            text += f"; it was at {frame}"
        return Report(failure=RankFailure("Killed" if killed else "Hang", text, stack), when=float("inf"))
    if job.file(rank, "report").exists():
        report: Report = torch.load(job.file(rank, "report"), map_location="cpu", weights_only=False)
        return report
    if code is not None and code < 0:
        failure = RankFailure("Signal", f"killed by {signal.Signals(-code).name}", stack)
    else:
        failure = RankFailure("Exit", f"exited with code {code} and without a result", stack)
    return Report(failure=failure, when=ended - _DIED_BEFORE)


def _raise_first(job: RankJob, reports: list[Report], outputs: list[str]) -> NoReturn:
    """Raise the first failure in time, with its traceback, its last output, and a line for each other rank that failed."""
    failures = {rank: report.failure for rank, report in enumerate(reports) if report.failure}
    rank = min(failures, key=lambda r: (reports[r].when, r))
    first = failures[rank]
    lines = [f"rank {rank} of {job.world} failed: {first.type_name}: {first.message}"]
    hanging = [r for r, failure in failures.items() if failure.type_name == "Hang"]
    if first.type_name == "Hang":
        lines = [f"rank(s) {', '.join(map(str, hanging))} of {job.world} did not finish within {job.timeout:g} s"]
    lines += [f"  rank {r}: {f.type_name}: {f.message}" for r, f in failures.items() if r != rank or r in hanging]
    if first.traceback:
        lines += [f"--- rank {rank}, traceback ---", first.traceback.rstrip()]
    if tail := outputs[rank].rstrip().splitlines()[-10:]:
        lines += [f"--- rank {rank}, last output ---", *tail]
    exception = reports[rank].exception
    cause = pickle.loads(exception) if exception else None
    raise RankError("\n".join(lines), rank=rank, errors=failures, output=dict(enumerate(outputs))) from cause


def _innermost(stack: str) -> str:
    """Return the innermost frame outside of torch of the main thread in a faulthandler dump, or an empty string."""
    main = stack.rpartition("Current thread")[2] or stack
    frames = re.findall(r'File "(.+)", line (\d+) in (.+)', main)
    outside = [frame for frame in frames if f"{os.sep}torch{os.sep}" not in frame[0]] or frames
    return f"{outside[0][0]}:{outside[0][1]} in {outside[0][2]}" if outside else ""


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _free_port() -> int:
    """Return a port that nobody listens on.

    Not one of the kernel's ephemeral ports, which `bind(0)` would give: a rank that connects to the store before it
    exists may get that very port as its own, and so connect to itself.
    """
    for port in random.SystemRandom().sample(range(10_000, 32_000), 100):
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise TPError("`run_ranks` found no free port among 100 between 10000 and 32000 on 127.0.0.1. Close some connections.")
