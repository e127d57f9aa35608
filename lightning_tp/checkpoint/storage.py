"""Where a checkpoint lies: a local path, or a URL of any file system that fsspec knows; and the few things that are done there.

Renames and `fsync` are for local file systems only; object stores have neither.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from lightning_tp.errors import TPError


class StoragePath:
    """One name in a file system.

    Args:
        url: a local path, or one with a protocol (`s3://..`, `memory://..`).
        options: of the file system, as fsspec takes them.

    Raises:
        TPError: if nobody here knows the protocol.

    Example:
        >>> place = StoragePath("memory://runs/last.ckpt")
        >>> place.is_local, place.exists(), StoragePath("file:///tmp/last.ckpt").path
        (False, False, '/tmp/last.ckpt')
    """

    def __init__(self, url: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> None:
        self.url, self.options = os.fspath(url), options
        try:
            self.fs, path = url_to_fs(self.url, **(options or {}))
        except (ValueError, ImportError) as error:
            raise TPError(
                f"`{self.url}`: the file system of this URL is not known here ({error}). Install its package for fsspec, or give a local path."
            ) from None
        self.path = path.rstrip("/") or "/"
        self.is_local = type(self.fs) is LocalFileSystem  # a subclass may be anything

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part."""
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> StoragePath:
        """What this is in."""
        if self.is_local:  # wherever the process may have gone since
            return StoragePath(os.path.dirname(self.path), self.options)
        return StoragePath(self.url.rstrip("/").rpartition("/")[0] if "/" in self.url.rstrip("/") else ".", self.options)

    def __truediv__(self, name: str) -> StoragePath:
        return StoragePath(f"{self.path if self.is_local else self.url.rstrip('/')}/{name}", self.options)

    def exists(self) -> bool:
        """Whether something of this name is there."""
        return os.path.exists(self.path) if self.is_local else bool(self._fresh().exists(self.path))

    def is_dir(self) -> bool:
        """Whether it is a folder."""
        return os.path.isdir(self.path) if self.is_local else bool(self._fresh().isdir(self.path))

    def is_file(self) -> bool:
        """Whether it is a file."""
        return os.path.isfile(self.path) if self.is_local else bool(self._fresh().isfile(self.path))

    def has(self, *names: str) -> bool:
        """Whether all these files are in the folder."""
        return all((self / name).is_file() for name in names)

    def size(self) -> int:
        """Bytes of the file."""
        return os.path.getsize(self.path) if self.is_local else int(self._fresh().size(self.path))

    def changed(self) -> float:
        """When it was written, in seconds; 0 where the file system does not say."""
        try:
            return os.path.getmtime(self.path) if self.is_local else self.fs.modified(self.path).timestamp()
        except (NotImplementedError, OSError):
            return 0.0

    def names(self) -> list[str]:
        """What is in the folder; nothing if it is none."""
        if self.is_local:
            with suppress(OSError):
                return sorted(os.listdir(self.path))
            return []
        if not self.is_dir():
            return []
        return sorted(entry.rstrip("/").rpartition("/")[2] for entry in self.fs.ls(self.path, detail=False))

    def make(self) -> None:
        """The folder, and those that it is in."""
        os.makedirs(self.path, exist_ok=True) if self.is_local else self.fs.makedirs(self.path, exist_ok=True)

    @contextmanager
    def open(self, mode: str) -> Iterator[Any]:
        """The file, in binary."""
        with open(self.path, mode) if self.is_local else self.fs.open(self.path, mode) as stream:
            yield stream

    def read(self) -> bytes:
        """What the file has in it."""
        with self.open("rb") as stream:
            data: bytes = stream.read()
        return data

    def remove(self) -> None:
        """Away with it, whatever it is; nothing happens if it is not there."""
        if not self.is_local:
            with suppress(FileNotFoundError):
                self.fs.rm(self.path, recursive=True)
        elif os.path.isdir(self.path) and not os.path.islink(self.path):
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            with suppress(FileNotFoundError):
                os.unlink(self.path)

    def sync(self) -> None:
        """Have a local folder's entries on the disk."""
        if not self.is_local:
            return
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:  # file systems that can't
            pass
        finally:
            os.close(descriptor)

    def _fresh(self) -> Any:
        self.fs.invalidate_cache()  # another process may have written there
        return self.fs
