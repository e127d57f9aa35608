"""A path where a checkpoint is: on this machine, or in any file system that fsspec knows; and the names of the files in a checkpoint folder.

Renames and `fsync` (see `core/staging.py`) are for local file systems only; object stores have neither.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from lightning_tp.core import files
from lightning_tp.errors import TPError

# torch and Lightning give the first two names
METADATA = ".metadata"  # of torch's distributed checkpoint: which file has which box of which tensor
META = "meta.pt"  # of Lightning: everything but the tensors of the model and of the optimizers
PLAN = "plan.json"  # how the model was split, for people
MANIFEST = "manifest.json"  # the length and the checksum of each file; written last
SHARDED = "lightning_tp_sharded"  # a folder with the DTensors of callbacks and hooks: see `nested.py`
UNFINISHED = ".lightning_tp_unfinished"  # in a store without renames: this folder was begun, and has no manifest yet
NAMES = {METADATA, META, PLAN, MANIFEST, SHARDED, UNFINISHED}


class StoragePath:
    """A file or a folder in a file system; it need not be there.

    Args:
        url: a local path, or one with a protocol (`s3://..`, `memory://..`).
        options: of the file system, as fsspec takes them.

    Raises:
        TPError: if no installed package knows the protocol.
    """

    def __init__(self, url: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> None:
        self.url, self.options = os.fspath(url), options
        try:
            self.fs, path = url_to_fs(self.url, **(options or {}))
        except (ValueError, ImportError) as error:
            raise TPError(
                f"`{self.url}`: unknown file system ({error}). Install the fsspec package for this protocol, or give a local path."
            ) from None
        self.path = path.rstrip("/") or "/"
        self.is_local = type(self.fs) is LocalFileSystem  # a subclass may be anything

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def local(self) -> Path:
        """The same on this machine, which `is_local` says it is; absolute, wherever the process goes."""
        return Path(self.path)

    @property
    def parent(self) -> StoragePath:
        """The folder around it."""
        return StoragePath((self.path if self.is_local else self.url.rstrip("/")).rpartition("/")[0] or "/", self.options)

    def __truediv__(self, name: str) -> StoragePath:
        return StoragePath(f"{self.path if self.is_local else self.url.rstrip('/')}/{name}", self.options)

    def is_dir(self) -> bool:
        """Return whether it is a folder."""
        return os.path.isdir(self.path) if self.is_local else bool(self._fresh().isdir(self.path))

    def is_file(self) -> bool:
        """Return whether it is a file."""
        return os.path.isfile(self.path) if self.is_local else bool(self._fresh().isfile(self.path))

    def size(self) -> int:
        """Return the number of bytes of the file."""
        return os.path.getsize(self.path) if self.is_local else int(self._fresh().size(self.path))

    def modified(self) -> float:
        """Return when it was last written, in seconds; 0 where the file system does not say."""
        try:
            return os.path.getmtime(self.path) if self.is_local else self.fs.modified(self.path).timestamp()
        except (NotImplementedError, OSError):
            return 0.0

    def names(self) -> list[str]:
        """List what is in the folder; nothing if it is none."""
        if self.is_local:
            with suppress(OSError):
                return sorted(os.listdir(self.path))
            return []
        if not self.is_dir():
            return []
        return sorted(entry.rstrip("/").rpartition("/")[2] for entry in self.fs.ls(self.path, detail=False))

    def make(self) -> None:
        """Create the folder, and those around it."""
        self.fs.makedirs(self.path, exist_ok=True)

    @contextmanager
    def open(self, mode: str) -> Iterator[Any]:
        """Open the file; `mode` is a binary one."""
        with open(self.path, mode) if self.is_local else self.fs.open(self.path, mode) as stream:
            yield stream

    def read(self) -> bytes:
        """Return the contents of the file."""
        with self.open("rb") as stream:
            data: bytes = stream.read()
        return data

    def remove(self) -> None:
        """Remove the file, or the folder with all that is in it; do nothing if it is not there."""
        if self.is_local:
            files.remove(self.path)
        else:
            with suppress(FileNotFoundError):
                self.fs.rm(self.path, recursive=True)

    def _fresh(self) -> Any:
        self.fs.invalidate_cache()  # another process may have written there
        return self.fs


def local_path(path: str | Path) -> Path:
    """Check that this can be a path on this machine, of a file or folder that need not be there; else raise a `TPError`."""
    text = os.fspath(path)
    if re.match(r"[A-Za-z][\w+.-]*:/", text):  # `Path` makes one stroke of two
        raise TPError(f"`{text}` is a URL; this takes local files only. Copy it to a local path first.")
    if not text or "\0" in text:
        raise TPError(f"{text!r} is not a valid path.")
    try:
        os.lstat(text)
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES):
            raise TPError(f"`{text[:200]}{'..' if len(text) > 200 else ''}` can't be opened: {error.strerror}.") from None
    if os.path.isdir(text) and not os.access(text, os.R_OK | os.X_OK):
        raise TPError(f"`{text}` can't be opened: permission denied.")
    return Path(path)


@contextmanager
def permission_errors(path: Path) -> Iterator[None]:
    """Raise `TPError` for what may not be read, naming the file, or else `path`."""
    try:
        yield
    except PermissionError as error:
        raise TPError(f"`{error.filename or path}` can't be read: {error.strerror}.") from None
