"""torch's distributed checkpoint in a folder of any file system: its writer with checksums, its reader without unpickling what it likes."""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata

from lightning_tp._compat import FsspecFiles
from lightning_tp.checkpoint.storage.path import StoragePath
from lightning_tp.checkpoint.storage.streams import ChecksumStream
from lightning_tp.checkpoint.storage.unpickle import SafeGlobals, first_line, read_metadata
from lightning_tp.core.comm.agree import Peers
from lightning_tp.errors import TPError

Entries = dict[str, dict[str, Any]]  # a file's path in the folder -> its "bytes" and "crc32"


class FolderFiles(FsspecFiles):
    """The files of one folder of any file system, as torch's reader and writer ask for them.

    Attributes:
        entries: length and checksum of each file that was written.
        failed: why a file could not be written.
        num_bytes: how much was written, files that were not completed included.
    """

    def __init__(self, folder: StoragePath) -> None:
        self.folder, self.fs = folder, folder.fs
        self.entries: Entries = {}
        self.failed: OSError | None = None
        self.num_bytes = 0

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        """Open a file for reading or writing."""
        name = os.path.relpath(path, self.folder.path)
        summed: ChecksumStream | None = None
        try:
            with (self.folder / name).open(mode) as raw:
                summed = ChecksumStream(raw) if "w" in mode else None
                yield raw if summed is None else summed
        except OSError as error:
            self.failed = self.failed or error
            raise
        finally:
            if summed is not None:
                self.num_bytes += summed.num_bytes
                self.failed = self.failed or summed.failed
        if summed is not None:
            self.entries[name] = summed.entry

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file, and flush it to the disk."""
        with self.create_stream(os.path.join(self.folder.path, name), "wb") as stream:
            stream.write(data)
            if self.folder.is_local:
                stream.flush()
                os.fsync(stream.fileno())

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file; its checksum goes with it."""
        super().rename(path, new_path)
        old, new = (os.path.relpath(p, self.folder.path) for p in (path, new_path))
        if old in self.entries:
            self.entries[new] = self.entries.pop(old)


class _Writer(dcp.FileSystemWriter):
    def __init__(self, files: FolderFiles, inside: str) -> None:
        path = f"{files.folder.path}/{inside}" if inside else files.folder.path
        super().__init__(path, sync_files=files.folder.is_local)
        self.fs, self.path = files, path  # type: ignore[assignment]


class _Reader(dcp.FileSystemReader):
    """torch's reader; `.metadata` is read by `read_metadata`, once."""

    def __init__(self, folder: StoragePath) -> None:
        super().__init__(folder.path)
        self.fs, self.path = FolderFiles(folder), folder.path  # type: ignore[assignment]
        self._metadata = cache(partial(read_metadata, folder))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata()


class _Planner(DefaultLoadPlanner):
    """torch's planner; values that are no tensors are loaded with `weights_only`."""

    def __init__(self, safe_globals: SafeGlobals, weights_only: bool | None) -> None:
        super().__init__()
        self.safe_globals, self.weights_only = safe_globals, weights_only

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        try:
            with torch.serialization.safe_globals(list(self.safe_globals)):
                loaded = torch.load(value, map_location="cpu", weights_only=self.weights_only is not False)
        except pickle.UnpicklingError as error:
            name = read_item.dest_index.fqn
            raise TPError(f"`{name}` in the checkpoint is not plain data, and is not loaded: {first_line(error)}") from None
        again = io.BytesIO()  # torch's own way of putting it into its place unpickles without a limit: what is harmless by now
        torch.save(loaded, again)
        again.seek(0)
        super().load_bytes(read_item, again)


@contextmanager
def _without_torchs_hint() -> Generator[None, None, None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def dcp_save(state: dict[str, Any], files: FolderFiles, peers: Peers, *, inside: str = "") -> None:
    """Write DTensors, and plain data that is equal on all ranks, as a distributed checkpoint in, or `inside`, the folder. A collective.

    `CheckpointException` has the errors of the ranks that could not write.
    """
    with _without_torchs_hint():
        dcp.save(state, storage_writer=_Writer(files, inside), process_group=peers.group, no_dist=peers.size == 1)


def dcp_load(
    state: dict[str, Any], folder: StoragePath, *, safe_globals: SafeGlobals = (), weights_only: bool | None = None
) -> None:
    """Fill a state dict, which has memory for what each rank asks for, from the folder of a distributed checkpoint. A collective.

    `safe_globals` and `weights_only` are as for `unpickle.load`. `TPError` on every rank, if one of them can't.
    """
    with _without_torchs_hint():
        try:
            dcp.load(state, storage_reader=_Reader(folder), planner=_Planner(safe_globals, weights_only))
        except CheckpointException as error:
            rank, (first, _) = next(iter(error.failures.items()))
            message = str(first) if isinstance(first, TPError) else f"`{folder}` can't be read: {type(first).__name__}: {first}"
            raise TPError(message + (f" (rank {rank})" if rank else "")) from error
