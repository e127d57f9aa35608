"""Write a file or a folder beside its target and give it the target's name at one instant: all of it is there, or nothing.

    <folder>/.lightning_tp/<name>.saving-<token>      while it is written; a crash leaves nothing else behind
    <folder>/<name>                                   from one instant to the next; what had the name before is removed after that

Over an existing folder the two exchange names (Linux `renameat2`). Where a file system can't do that, the old one is renamed to
`.lightning_tp/<name>.replaced-<token>` first, and `recover` mends what a crash between the two renames leaves. All files and folders are
flushed to the disk before the rename, and the folder around them after it: this holds for a crash of the machine, too.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import socket
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lightning_tp.core import files

ASIDE = ".lightning_tp"  # hidden: Lightning's search for checkpoints does not look into it


@dataclass(frozen=True)
class Staging:
    """The path to write to first, and the target whose name it takes."""

    target: Path
    path: Path

    def commit(self) -> None:
        """Give the target's name to what was written, and remove what had it. Its files have to be on the disk: see `flush_files`."""
        for folder, _, _ in os.walk(self.path, topdown=False):
            files.fsync(folder)
        files.fsync(self.path.parent)
        folders = [p for p in (self.path, self.target) if p.is_dir() and not p.is_symlink()]
        if not os.path.lexists(self.target) or not folders:
            os.replace(self.path, self.target)
            files.fsync(self.target.parent)
        elif rename_exchange(str(self.path), str(self.target)):
            files.fsync(self.target.parent)
            files.remove(self.path)
        else:
            replaced = _aside(self.target, "replaced", self.path.name.rpartition(".saving-")[2])
            os.rename(self.target, replaced)
            try:
                os.rename(self.path, self.target)
            except OSError:
                os.rename(replaced, self.target)
                raise
            files.fsync(self.target.parent)
            files.remove(replaced)
        _remove_if_empty(self.target.parent / ASIDE)

    def discard(self) -> None:
        """Remove what was written so far."""
        files.remove(self.path)
        _remove_if_empty(self.target.parent / ASIDE)


def begin(target: Path, *, folder: bool, shared: bool = False) -> Staging:
    """Make room beside a target, and remove what crashes have left there.

    Args:
        target: the file or folder that will be written.
        folder: whether it is a folder, which is created.
        shared: whether other processes may be writing to the same target now. Then only what is known to be left is removed: what
            processes of this machine wrote that have ended.
    """
    recover(target, shared=shared)
    for entry in _entries(target.parent):
        if entry.kind == "removed" or (entry.name == target.name and not (shared and _may_be_in_use(entry.token))):
            files.remove(entry.path)
    path = _aside(target, "saving", f"{_machine()}-{os.getpid()}-{secrets.token_hex(4)}")
    os.makedirs(path if folder else path.parent, exist_ok=True)
    return Staging(target, path)


@contextmanager
def staged(target: Path, *, folder: bool, shared: bool = False) -> Iterator[Path]:
    """Yield a path to write to, flush it at the end, and give it the target's name; after an error nothing is left of it. See `begin`."""
    staging = begin(target, folder=folder, shared=shared)
    try:
        yield staging.path
        flush_files(staging.path)
        staging.commit()
    except BaseException:
        staging.discard()
        raise


def flush_files(path: Path) -> None:
    """Flush a file, or all files in a folder, to the disk."""
    for file in [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]:
        files.fsync(file)


def recover(target: Path, is_complete: Callable[[Path], bool] | None = None, *, shared: bool = False) -> None:
    """Give a target its name back if a crash came between two renames: or to what was to replace it, if that `is_complete`."""
    if os.path.lexists(target):
        return
    for entry in _entries(target.parent):
        if entry.name == target.name and entry.kind == "replaced" and not (shared and _may_be_in_use(entry.token)):
            new = _aside(target, "saving", entry.token)
            os.rename(new if is_complete is not None and is_complete(new) else entry.path, target)
            return


def recoverable(folder: Path) -> list[str]:
    """List the names in a folder that are missing, and that `recover` would bring back."""
    names = {entry.name for entry in _entries(folder) if entry.kind == "replaced"}
    return sorted(name for name in names if not os.path.lexists(folder / name))


def remove_at_once(folder: Path) -> None:
    """Remove a folder; its name is free at once, however long it takes to remove its files. Do nothing if it is not there."""
    removed = _aside(folder, "removed", secrets.token_hex(4))
    os.makedirs(removed.parent, exist_ok=True)
    with suppress(FileNotFoundError):
        os.rename(folder, removed)
    files.remove(removed)
    _remove_if_empty(removed.parent)


class _Entry(NamedTuple):
    path: Path
    name: str  # of the target
    kind: str  # "saving", "replaced" or "removed"
    token: str  # of who wrote it: the machine, the process, and a random number


def _entries(folder: Path) -> list[_Entry]:
    names: list[str] = []
    with suppress(OSError):
        names = sorted(os.listdir(folder / ASIDE))
    matches = [re.fullmatch(r"(.+)\.(saving|replaced|removed)-([^.]+)", name) for name in names]
    return [_Entry(folder / ASIDE / match[0], match[1], match[2], match[3]) for match in matches if match is not None]


def _aside(target: Path, kind: str, token: str) -> Path:
    return target.parent / ASIDE / f"{target.name}.{kind}-{token}"


def _may_be_in_use(token: str) -> bool:
    """Whether the process that wrote under this token may be alive; False for this process, which writes to a target once at a time."""
    machine, _, rest = token.partition("-")
    pid = rest.partition("-")[0]
    if machine != _machine() or not pid.isdigit():
        return True
    if int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        pass
    return True


def _machine() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        os.rmdir(folder)


def rename_exchange(a: str, b: str) -> bool:
    """Exchange two names of a file system atomically, by Linux's `renameat2`; False if the system or the file system can't.

    Raises:
        OSError: for other reasons (one of them is missing).
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    at_fdcwd, exchange = -100, 2
    if renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), a, None, b)
