"""The files of a distributed checkpoint, for torch's reader and writer: of any file system, summed while they are written."""

from __future__ import annotations

import os
import zlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemBase

from lightning_tp.checkpoint.storage import StoragePath

Sums = dict[str, dict[str, Any]]


class Summed:
    """A stream whose bytes are counted and summed (crc32) while they pass; remembers why the disk would not take them."""

    def __init__(self, raw: Any) -> None:
        self.raw, self.bytes, self.crc = raw, 0, 0
        self.failed: OSError | None = None

    def write(self, data: Any) -> int:
        """All of it."""
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):  # an unbuffered file may take less
                done += self.raw.write(view[done:] if done else view)
        except OSError as error:
            self.failed = self.failed or error
            raise
        self.crc = zlib.crc32(view, self.crc)
        self.bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """To the system."""
        try:
            self.raw.flush()
        except OSError as error:
            self.failed = self.failed or error
            raise

    def tell(self) -> int:
        """Where the next byte goes."""
        return self.bytes

    def fileno(self) -> int:
        """For `fsync`."""
        descriptor: int = self.raw.fileno()
        return descriptor

    def close(self) -> None:
        """Left to whoever has opened it."""

    @property
    def sums(self) -> dict[str, Any]:
        """As a manifest has them."""
        return {"bytes": self.bytes, "crc32": f"{self.crc:08x}"}


class Files(FileSystemBase):
    """What torch's reader and writer ask of a file system, for the files of one folder.

    Attributes:
        sums: of what was written, by name in the folder.
        failed: why a file could not be written.
        bytes: that were written, also of files that were not done.
    """

    def __init__(self, folder: StoragePath) -> None:
        self.folder = folder
        self.sums: Sums = {}
        self.failed: OSError | None = None
        self.bytes = 0

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        """A file, for reading or for writing."""
        name = os.path.relpath(os.fspath(path), self.folder.path)
        if "w" not in mode:
            with (self.folder / name).open(mode) as stream:
                yield stream
            return
        summed: Summed | None = None
        try:
            with (self.folder / name).open(mode) as raw:
                summed = Summed(raw)
                yield summed
        except OSError as error:
            self.failed = self.failed or error
            raise
        finally:
            if summed is not None:
                self.bytes += summed.bytes
                self.failed = self.failed or summed.failed
        self.sums[name] = summed.sums

    def write(self, name: str, data: bytes) -> None:
        """A file of this rank, down to the disk."""
        with self.create_stream(os.path.join(self.folder.path, name), "wb") as stream:
            stream.write(data)
            if self.folder.is_local:
                stream.flush()
                os.fsync(stream.fileno())

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        """A name in a folder."""
        return f"{os.fspath(path)}/{suffix}"

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """With its sums."""
        names = [os.path.relpath(os.fspath(p), self.folder.path) for p in (path, new_path)]
        if self.folder.is_local:
            os.replace(path, new_path)
        else:
            self.folder.fs.mv(os.fspath(path), os.fspath(new_path))
        if names[0] in self.sums:
            self.sums[names[1]] = self.sums.pop(names[0])

    def init_path(self, path: str | os.PathLike[str]) -> str:
        """As it is."""
        return os.fspath(path)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """A folder, if it is not there yet."""
        if self.folder.is_local:
            os.makedirs(path, exist_ok=True)
        else:
            self.folder.fs.makedirs(os.fspath(path), exist_ok=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Not asked for: this goes to readers and writers that were made already."""
        return True

    def exists(self, path: str | os.PathLike[str]) -> bool:
        """Whether a file or folder is there."""
        return os.path.exists(path) if self.folder.is_local else bool(self.folder.fs.exists(os.fspath(path)))

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        """Away with it."""
        os.unlink(path) if self.folder.is_local else self.folder.fs.rm_file(os.fspath(path))


class Writer(dcp.FileSystemWriter):
    """torch's writer into a folder (or one inside it), by way of `Files`."""

    def __init__(self, files: Files, inside: str = "") -> None:
        path = f"{files.folder.path}/{inside}" if inside else files.folder.path
        super().__init__(path, sync_files=files.folder.is_local)
        self.fs = files  # type: ignore[assignment]
        self.path = path


def total(sums: Mapping[str, Mapping[str, Any]]) -> int:
    """Bytes of all files."""
    return sum(int(of["bytes"]) for of in sums.values())
