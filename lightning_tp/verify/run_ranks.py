"""Run a function in several real processes of one machine, or in one process that pretends to be many.

`run_ranks` starts one process per rank with the environment of `torchrun` and a gloo process group, and brings back the
results, or the error of the rank that failed first. It covers one machine only, and it is no launcher for training: a
Lightning `Trainer` inside (with `init=False`) finds `TorchElasticEnvironment` and launches nothing.

`fake_world` rests on `torch.testing._internal.distributed.fake_pg`: collectives there move no data.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import io
import logging
import multiprocessing
import os
import pickle
import random
import re
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TextIO, TypeVar, overload

import torch
import torch.distributed as dist

from lightning_tp.errors import TPError

T = TypeVar("T")


Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


_GRACE = 5.0  # seconds that the other ranks get to end by themselves after one failed


_DUMP = 0.5  # seconds that a hanging rank gets to write its stack before it is killed


_DIED_BEFORE = 0.5  # a rank that died without a word was dead this long before we noticed, at most


class RankFailure(NamedTuple):
    """How one rank failed.

    `type_name` is the exception's class name, or `Hang` (still running at the timeout), `Killed` (still running some
    seconds after another rank failed), `Signal` (killed by a signal, such as a segmentation fault) or `Exit` (ended
    without a result). `traceback` is text; for a rank that was stopped it is the stack where it stood.

    Example:
        >>> RankFailure("ValueError", "boom", "Traceback ...").message
        'boom'
    """

    type_name: str
    message: str
    traceback: str


class RankError(RuntimeError):
    """At least one rank of `run_ranks` failed; the message is that of the rank that failed first in time.

    Where the original exception pickles it is the `__cause__` of this one.

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
def run_ranks(
    fn: Callable[..., T],
    world: int,
    *args: Any,
    timeout: float = ...,
    start_method: Literal["fork", "spawn"] | None = ...,
    backend: str = ...,
    init: bool = ...,
    return_output: Literal[False] = ...,
    **kwargs: Any,
) -> list[T]: ...


@overload
def run_ranks(
    fn: Callable[..., T],
    world: int,
    *args: Any,
    timeout: float = ...,
    start_method: Literal["fork", "spawn"] | None = ...,
    backend: str = ...,
    init: bool = ...,
    return_output: Literal[True],
    **kwargs: Any,
) -> list[tuple[T, str]]: ...


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

    Each process has the environment variables that `torchrun` sets, one thread, and (unless `init=False`) a default
    process group. Under fork, `fn` may be a lambda or a closure; under spawn it must be importable. Results are
    pickled; tensors come back on the CPU.

    Args:
        fn: The function. It learns its rank from `torch.distributed.get_rank()` or `os.environ["RANK"]`.
        world: Number of ranks.
        *args: Positional arguments of `fn`.
        timeout: Seconds until all ranks are killed and those still running are named as hanging.
        start_method: `fork` or `spawn`. By default fork on Linux as long as this process has not initialised CUDA.
        backend: Backend of the process group; `nccl` also makes `cuda:LOCAL_RANK` the current device.
        init: Make the process group. Pass `False` if `fn` does it, as a Lightning `Trainer` does.
        return_output: Return `(result, output)` per rank, where output is what it printed to stdout and stderr.
        **kwargs: Keyword arguments of `fn`; for one named like an argument above use `functools.partial`.

    Raises:
        RankError: If a rank raised, exited with a nonzero code, died, or hung. The others get 5 s to end by themselves.

    Example:
        >>> def total(x):
        ...     x = x + dist.get_rank()
        ...     dist.all_reduce(x)
        ...     return x
        >>> run_ranks(total, 2, torch.zeros(2))
        [tensor([1., 1.]), tensor([1., 1.])]
    """
    if world < 1:
        raise TPError(f"`run_ranks` got `world={world}`. Pass the number of ranks, 1 or more.")
    method = start_method or ("fork" if sys.platform == "linux" and not torch.cuda.is_initialized() else "spawn")
    if method == "fork" and dist.is_initialized():
        raise TPError(
            f"`run_ranks` cannot fork {world} ranks while this process is in a process group of"
            f" {dist.get_world_size()}: they would inherit its sockets. Call"
            " `torch.distributed.destroy_process_group()` first, or pass `start_method='spawn'`."
        )
    with tempfile.TemporaryDirectory(prefix="run_ranks-", ignore_cleanup_errors=True) as folder:
        job = _Job(Path(folder), world, backend, init, timeout, _free_port())
        outcomes = _run(job, method, (fn, args, kwargs))
    if any(outcome.failure for outcome in outcomes):
        _raise(job, outcomes)
    return [(o.value, o.output) for o in outcomes] if return_output else [o.value for o in outcomes]


@dataclass(frozen=True)
class _Job:
    """One call of `run_ranks`: its settings and the files through which a rank reports."""

    folder: Path
    world: int
    backend: str
    init: bool
    timeout: float
    port: int

    @property
    def call(self) -> Path:
        return self.folder / "call.pt"

    def report(self, rank: int) -> Path:
        return self.folder / f"{rank}.pt"

    def output(self, rank: int) -> Path:
        return self.folder / f"{rank}.out"

    def stack(self, rank: int) -> Path:
        return self.folder / f"{rank}.stack"

    def environment(self, rank: int) -> dict[str, str]:
        """What `torchrun` sets for a rank, less the agent's store: rank 0 makes the store, as `env://` does alone."""
        values: dict[str, object] = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": self.world,
            "LOCAL_WORLD_SIZE": self.world,
            "GROUP_RANK": 0,
            "GROUP_WORLD_SIZE": 1,
            "ROLE_NAME": "default",
            "ROLE_RANK": rank,
            "ROLE_WORLD_SIZE": self.world,
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


@dataclass(frozen=True)
class _Outcome:
    """What became of one rank, as the parent sees it; `when` is on the monotonic clock, which all processes share."""

    output: str
    value: Any = None
    failure: RankFailure | None = None
    when: float = 0.0
    exception: BaseException | None = None


def _run(job: _Job, method: str, call: Call) -> list[_Outcome]:
    """Start the ranks, wait, stop those that are late, and read what they left."""
    context = multiprocessing.get_context(method)
    if method == "spawn":  # not through Process(args=...), which would put tensors into shared memory
        torch.save(call, job.call, pickle_protocol=pickle.HIGHEST_PROTOCOL)
    processes: dict[int, BaseProcess] = {}
    try:
        for rank in range(job.world):
            args = (job, rank, call if method == "fork" else None)
            process = context.Process(target=_child, args=args, name=f"rank{rank}")  # type: ignore[attr-defined]
            with _environment(job.environment(rank)), warnings.catch_warnings():
                # Python 3.12 warns of a fork beside threads; torch mends its own state in a child
                warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
                process.start()
            processes[rank] = process
        ended, late = _wait(processes, job.timeout)
        _dump_stacks(processes, late)
    finally:
        codes = {rank: _stop(process) for rank, process in processes.items()}
    failed = any(code != 0 for rank, code in codes.items() if rank not in late)
    return [_outcome(job, rank, codes[rank], ended.get(rank), killed=failed) for rank in range(job.world)]


def _wait(processes: Mapping[int, BaseProcess], timeout: float) -> tuple[dict[int, float], list[int]]:
    """Wait for all ranks, but only `_GRACE` seconds once one has failed: when each ended, and which still run."""
    ended: dict[int, float] = {}
    limit = time.monotonic() + timeout
    while len(ended) < len(processes):
        running = [rank for rank in processes if rank not in ended]
        left = limit - time.monotonic()
        if left <= 0:
            return ended, running
        # a rank's own children may hold its sentinel open, so look at the process every quarter of a second
        wait_for_any([processes[rank].sentinel for rank in running], timeout=min(left, 0.25))
        for rank in running:
            if not processes[rank].is_alive():
                ended[rank] = time.monotonic()
                if processes[rank].exitcode != 0:
                    limit = min(limit, ended[rank] + _GRACE)
    return ended, []


def _dump_stacks(processes: Mapping[int, BaseProcess], late: list[int]) -> None:
    """Have each late rank write where it stands into its stack file."""
    if not late or not hasattr(signal, "SIGUSR1"):
        return
    for rank in late:
        with contextlib.suppress(ProcessLookupError):
            os.kill(processes[rank].pid or 0, signal.SIGUSR1)
    time.sleep(_DUMP)


def _stop(process: BaseProcess) -> int | None:
    """Kill the process, if it still runs, with all processes that it started; return its exit code."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid or 0, signal.SIGKILL)
    process.kill()
    process.join()
    code = process.exitcode
    process.close()
    return code


def _outcome(job: _Job, rank: int, code: int | None, ended: float | None, killed: bool) -> _Outcome:
    output = _read(job.output(rank))
    stack = _read(job.stack(rank))
    if ended is None:
        if killed:
            text = "killed, since another rank had failed"
        else:
            text = f"did not finish within {job.timeout:g} s"
        if frame := _innermost(stack):
            text += f"; it stood at {frame}"
        failure = RankFailure("Killed" if killed else "Hang", text, stack)
        return _Outcome(output, failure=failure, when=float("inf"))
    if job.report(rank).exists():
        report = torch.load(job.report(rank), map_location="cpu", weights_only=False)
        exception = pickle.loads(report["exception"]) if report["exception"] else None
        return _Outcome(output, report["value"], report["failure"], report["when"], exception)
    if code is not None and code < 0:
        failure = RankFailure("Signal", f"killed by {signal.Signals(-code).name}", stack)
    else:
        failure = RankFailure("Exit", f"ended with code {code} and without a result", stack)
    return _Outcome(output, failure=failure, when=ended - _DIED_BEFORE)


def _raise(job: _Job, outcomes: list[_Outcome]) -> NoReturn:
    """Raise the first failure in time; the message has its traceback, its last output and a line on each other rank."""
    failures = {rank: outcome.failure for rank, outcome in enumerate(outcomes) if outcome.failure}
    rank = min(failures, key=lambda r: (outcomes[r].when, r))
    first = failures[rank]
    lines = [f"rank {rank} of {job.world} failed: {first.type_name}: {first.message}"]
    hanging = [r for r, failure in failures.items() if failure.type_name == "Hang"]
    if first.type_name == "Hang":
        lines = [f"rank(s) {', '.join(map(str, hanging))} of {job.world} did not finish within {job.timeout:g} s"]
    lines += [f"  rank {r}: {f.type_name}: {f.message}" for r, f in failures.items() if r != rank or r in hanging]
    if first.traceback:
        lines += [f"--- rank {rank}, where ---", first.traceback.rstrip()]
    if tail := outcomes[rank].output.rstrip().splitlines()[-10:]:
        lines += [f"--- rank {rank}, last output ---", *tail]
    output = {r: outcome.output for r, outcome in enumerate(outcomes)}
    raise RankError("\n".join(lines), rank=rank, errors=failures, output=output) from outcomes[rank].exception


def _innermost(stack: str) -> str:
    """The innermost frame outside torch of the main thread in a faulthandler dump, or an empty text."""
    main = stack.rpartition("Current thread")[2] or stack
    frames = re.findall(r'File "(.+)", line (\d+) in (.+)', main)
    own = [frame for frame in frames if f"{os.sep}torch{os.sep}" not in frame[0]] or frames
    return f"{own[0][0]}:{own[0][1]} in {own[0][2]}" if own else ""


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _free_port() -> int:
    """A port that nobody listens on.

    Not one of the kernel's ephemeral ports, as `bind(0)` would give: a rank that connects to the store before it is
    there may be handed that very port as its own and so connect to itself.
    """
    for port in random.SystemRandom().sample(range(10_000, 32_000), 100):
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise TPError("`run_ranks` found no free port among 100 between 10000 and 32000 on 127.0.0.1. Free some.")


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, which a process started inside inherits, and restore them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _child(job: _Job, rank: int, call: Call | None) -> NoReturn:
    """A rank's whole life. It ends by `os._exit`: a forked rank must not run its parent's exit handlers."""
    code = 1
    gc.freeze()  # what a fork brings along is never garbage here; to look through it would also copy its memory
    try:
        if hasattr(os, "setpgrp"):
            os.setpgrp()  # so that whatever this rank starts is killed with it
        _redirect_output(job.output(rank))
        with open(job.stack(rank), "w") as stack:
            _prepare(job, rank, stack)
            report, code = _report(job, rank, call)
            partial = job.report(rank).with_suffix(".partial")
            partial.write_bytes(report)
            os.replace(partial, job.report(rank))
    except BaseException:
        traceback.print_exc()  # a mistake of this file: the parent sees a rank without a report, and this output
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _redirect_output(path: Path) -> None:
    """Send this process's stdout and stderr to a file, whether written by Python, by C++ or by a logger."""
    old = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    sys.stdout = sys.__stdout__ = _text_stream(1)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _text_stream(2)  # type: ignore[misc]
    # handlers made before the fork hold the parent's stream, which under pytest is neither 1 nor 2
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for handler in (handler for logger in loggers for handler in getattr(logger, "handlers", [])):
        if isinstance(handler, logging.StreamHandler) and any(handler.stream is stream for stream in old):
            handler.setStream(sys.stderr)


def _text_stream(descriptor: int) -> io.TextIOWrapper:
    return os.fdopen(descriptor, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)


def _prepare(job: _Job, rank: int, stack: TextIO) -> None:
    """One thread, a stack dump on request and on a crash, and an end even if the parent is gone."""
    torch.set_num_threads(1)
    faulthandler.disable()  # the parent's; enabling it again would not bring back a handler that something has replaced
    faulthandler.enable(stack)
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(job.timeout) + 60)
    rank_zero = sys.modules.get("lightning_utilities.core.rank_zero")
    if rank_zero is not None:  # read from the environment at import, which a fork has behind it
        rank_zero.rank_zero_only.rank = rank


def _report(job: _Job, rank: int, call: Call | None) -> tuple[bytes, int]:
    """Run the function in its process group; what came of it, pickled, and the exit code."""
    try:
        fn, args, kwargs = call or torch.load(job.call, weights_only=False)
        if "nccl" in job.backend:
            torch.cuda.set_device(rank)
        if job.init:
            dist.init_process_group(
                job.backend,
                init_method=f"file://{job.folder / 'store'}",
                rank=rank,
                world_size=job.world,
                timeout=timedelta(seconds=job.timeout + 60),  # the parent's clock comes first, and says where it hangs
            )
            if "gloo" in job.backend:
                dist.barrier()  # a function that soon ends would close connections that another rank is still making
        try:
            value = fn(*args, **kwargs)
        except SystemExit as end:
            if end.code not in (None, 0):
                raise
            value = None
        report = _pickled_result(value, rank)
        if dist.is_initialized():
            dist.destroy_process_group()
        return report, 0
    except BaseException as error:
        when = time.monotonic()
        trace = error.__traceback__ and error.__traceback__.tb_next  # from `fn` on, without this function's frame
        text = "".join(traceback.format_exception(type(error), error, trace))
        failure = RankFailure(type(error).__name__, str(error), text)
        return _pickled({"value": None, "failure": failure, "when": when, "exception": _pickled_exception(error)}), 1


def _pickled(report: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(report, buffer, pickle_protocol=pickle.HIGHEST_PROTOCOL)
    return buffer.getvalue()


def _pickled_result(value: object, rank: int) -> bytes:
    try:
        return _pickled({"value": value, "failure": None, "when": time.monotonic(), "exception": None})
    except Exception as error:
        raise TypeError(f"rank {rank} returned a {type(value).__name__} that does not pickle: {error}") from error


def _pickled_exception(error: BaseException) -> bytes | None:
    """The exception as bytes, if it survives the way there and back."""
    try:
        data = pickle.dumps(error)
        return data if type(pickle.loads(data)) is type(error) else None
    except Exception:
        return None
