"""Run a function in a forked child and take its result: what it does to objects, generators, iterators and the screen is gone with the child."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import re
import select
import shutil
import signal
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
QUIET = 60.0  # seconds without any CPU time after which a child is taken to wait for what is not there: a thread, a lock
POLL = 1.0  # seconds between two looks at it
MOST_COPIED = 1 << 26  # bytes of a file that is open for reading and writing, up to which the child has a copy


class NoChild(Exception):
    """No child could do the work: this system does not fork, or the child was ended, or needed what only its parent has."""


def in_child(work: Callable[[], T]) -> T:
    """Return what `work` returns in a forked child, or raise what it raises there (without a traceback; the rest of the error is kept).

    The child writes nothing: not to the screen, and files that it opens for writing are temporary ones. It runs on one thread, since those of its
    parent are not there.

    Raises:
        NoChild: if it has to be done here.

    Example:
        >>> seen = []
        >>> in_child(lambda: seen.append(1) or 3), seen
        (3, [])
    """
    if sys.platform != "linux":
        raise NoChild("this system does not fork safely")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with tempfile.TemporaryDirectory(prefix="lightning-tp-") as folder:
        answer, status = _answer_of_child(work, Path(folder))
    if not answer:
        raise NoChild(f"the child ended with status {status}")
    good, value = pickle.loads(answer)
    if good:
        result: T = value
        return result
    if "forked subprocess" in str(value) or "fork-based multiprocessing" in str(value):  # CUDA, autograd's threads
        raise NoChild(str(value))
    raise value


def _answer_of_child(work: Callable[[], Any], folder: Path) -> tuple[bytes, int]:
    """(what a child writes, its status); nothing if it ended before."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        child = os.fork()
    if not child:
        _child(work, writer, folder)
    os.close(writer)
    status = 0
    try:
        answer = _read(reader, child)
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)  # has ended, or has to
        _, status = os.waitpid(child, 0)
    return answer, status


def _child(work: Callable[[], Any], writer: int, folder: Path) -> None:
    try:
        _keep_still(folder)
        try:
            answer = _pickled((True, work()))
        except Exception as error:
            try:
                answer = _pickled((False, error))
            except Exception:  # an error with arguments of its own, or with tensors
                answer = _pickled((False, RuntimeError(f"{type(error).__name__}: {error}")))
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(answer)
    finally:
        os._exit(0)


def _pickled(answer: Any) -> bytes:
    data = pickle.dumps(answer)
    pickle.loads(data)
    return data


def _keep_still(folder: Path) -> None:
    """Write nothing that stays."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    sys.stdout = sys.stderr = os.fdopen(nothing, "w")  # also where they were something else: a notebook's, a test's
    torch.set_num_threads(1)
    _write_files_apart(folder)
    builtins.open = io.open = _open_apart(open, folder)
    torch.save = _save_by_open(torch.save)


def _write_files_apart(folder: Path) -> None:
    """Let files that are open for writing, a log's for instance, be ones in a folder of the child: of the same length, and at the same position."""
    for name in os.listdir("/proc/self/fd"):
        try:
            status = os.fstat(int(name))
            flags = int(re.findall(r"flags:\s*(\d+)", Path(f"/proc/self/fdinfo/{name}").read_text())[0], 8)
            position = os.lseek(int(name), 0, os.SEEK_CUR)
        except (OSError, IndexError):  # the descriptor that lists them, a pipe
            continue
        mode = flags & os.O_ACCMODE
        if not stat.S_ISREG(status.st_mode) or mode == os.O_RDONLY or (mode == os.O_RDWR and status.st_size > MOST_COPIED):
            continue
        apart = os.open(folder / f"open-{name}", os.O_RDWR | os.O_CREAT | (flags & os.O_APPEND))
        if mode == os.O_RDWR:
            os.pwrite(apart, os.pread(int(name), status.st_size, 0), 0)
        os.ftruncate(apart, status.st_size)
        os.lseek(apart, position, os.SEEK_SET)
        os.dup2(apart, int(name))
        os.close(apart)


def _save_by_open(save: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.save` for a child: it would open a path by itself."""

    def save_by_open(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(f, (str, os.PathLike)):
            return save(obj, f, *args, **kwargs)
        with open(f, "wb") as file:
            save(obj, file, *args, **kwargs)

    return save_by_open


def _open_apart(own: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """`open` for a child: what it would write to is a copy in a folder of its own."""
    copies: dict[str, Path] = {}

    def open_apart(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if isinstance(file, int) or (isinstance(file, (str, bytes, os.PathLike)) and os.fsdecode(file).startswith("/dev/")):
            return own(file, mode, *args, **kwargs)
        path = os.path.abspath(os.fsdecode(file))
        if set(mode) & set("wax+"):
            if path not in copies:
                if not os.path.isdir(os.path.dirname(path)) or ("x" in mode and os.path.exists(path)):
                    return own(file, "r")  # raises as it would
                copies[path] = folder / str(len(copies))
                if os.path.exists(path):
                    with own(path, "rb") as source, own(copies[path], "wb") as target:
                        shutil.copyfileobj(source, target)
            mode = mode.replace("x", "w")
        return own(copies.get(path, file), mode, *args, **kwargs)

    return open_apart


def _read(reader: int, child: int) -> bytes:
    """Read all that a child writes; nothing if it has done nothing for `QUIET`."""
    parts: list[bytes] = []
    quiet, used = 0.0, -1
    while True:
        if select.select([reader], [], [], POLL)[0]:
            part = os.read(reader, 1 << 20)
            if not part:
                return b"".join(parts)
            parts.append(part)
            continue
        now = _cpu_time(child)
        quiet, used = (quiet + POLL, used) if now == used else (0.0, now)
        if quiet >= QUIET:
            return b""


def _cpu_time(process: int) -> int:
    """Ticks of CPU time that a process has used."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1
    return int(fields[11]) + int(fields[12])
