"""Reading a checkpoint without running what is in it: no pickle of it may call anything but what makes tensors and plain data.

torch reads three pickles of a checkpoint folder: `.metadata`, whatever is in `meta.pt`, and each value that is no tensor. It unpickles the first
and the last without a limit; here they go through an unpickler that knows the classes of distributed checkpoint only, and through
`torch.load(weights_only=True)`.
"""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from lightning_tp._compat import METADATA_CLASSES
from lightning_tp.checkpoint.files import Files
from lightning_tp.checkpoint.storage import StoragePath
from lightning_tp.errors import TPError

SafeGlobals = Sequence[Callable[..., Any]]


def load(file: StoragePath, *, safe_globals: SafeGlobals = (), weights_only: bool | None = None, mmap: bool = False) -> Any:
    """What `torch.save` has written, onto the CPU.

    Args:
        file: where it is.
        safe_globals: classes beside torch's own that may be made of it.
        weights_only: False runs whatever its pickle says: for files that you trust. Default: True.
        mmap: leave tensors on the disk until they are read, where the file is local.

    Raises:
        TPError: if it has a class in it that is not allowed; it says which.
    """
    safe = weights_only is not False
    with torch.serialization.safe_globals(list(safe_globals)):
        try:
            if file.is_local:
                return torch.load(file.path, map_location="cpu", weights_only=safe, mmap=mmap)
            with file.open("rb") as stream:
                return torch.load(stream, map_location="cpu", weights_only=safe)
        except pickle.UnpicklingError as error:
            names = _not_allowed(file) if safe else []
            if not names:
                raise TPError(f"`{file}` can't be read: {_first_line(error)}") from None
            short = names[0].rpartition(".")[2]
            raise TPError(
                f"`{file}` has objects of {', '.join(f'`{name}`' for name in names)} in it, which is not made of a file unless you "
                f"allow it. If you know the class: `TPStrategy(safe_globals=[{short}])`. If you trust whoever wrote the file: "
                "`trainer.fit(.., weights_only=False)`, which runs whatever is in it."
            ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _not_allowed(file: StoragePath) -> list[str]:
    try:
        if file.is_local:
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file.path))
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(file.read())))
    except Exception:  # it is only to say it better
        return []


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, stream: Any, where: str) -> None:
        super().__init__(stream)
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        if name in METADATA_CLASSES.get(module, ()):
            if module.startswith("pathlib"):
                return _as_text  # where it was written: of no use here, and not for this system maybe
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), (torch.dtype, torch.layout, torch.memory_format)):
            return found
        raise TPError(
            f"`{self._where}` would make an object of `{module}.{name}`, which has no place in the metadata of a distributed checkpoint. It was "
            "not written by torch, or somebody has changed it; nothing of it was read."
        )


def _as_text(*parts: str) -> str:
    return os.path.join(*parts) if parts else "."


def read_metadata(folder: StoragePath) -> Metadata:
    """The `.metadata` of a distributed checkpoint.

    Raises:
        TPError: if there is none, it is damaged, or has something else in it.
    """
    file = folder / ".metadata"
    try:
        with file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream, str(file)).load()
    except (TPError, MemoryError):
        raise
    except FileNotFoundError:
        raise TPError(f"`{folder}` is no distributed checkpoint: there is no `.metadata` in it.") from None
    except Exception as error:  # a damaged pickle raises anything
        raise TPError(f"`{file}` is damaged: {type(error).__name__}: {error}.") from None
    if not isinstance(metadata, Metadata):
        raise TPError(f"`{file}` is damaged: a {type(metadata).__name__} is in it.")
    if getattr(metadata, "storage_meta", None) is None:
        metadata.storage_meta = StorageMeta()
    return metadata


class Reader(dcp.FileSystemReader):
    """torch's reader, of any file system, for `dcp.load(storage_reader=..)`: `.metadata` is read by `read_metadata`."""

    def __init__(self, folder: StoragePath) -> None:
        super().__init__(folder.path)
        self.folder = folder
        self.fs = Files(folder)  # type: ignore[assignment]
        self.path = folder.path
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Once for each reader."""
        if self._metadata is None:
            self._metadata = read_metadata(self.folder)
        return self._metadata


class Planner(DefaultLoadPlanner):
    """torch's planner, whose values that are no tensors are read with `weights_only`."""

    def __init__(self, safe_globals: SafeGlobals = (), weights_only: bool | None = None) -> None:
        super().__init__()
        self.safe_globals, self.weights_only = safe_globals, weights_only

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Into the place that it was asked for."""
        try:
            with torch.serialization.safe_globals(list(self.safe_globals)):
                loaded = torch.load(value, weights_only=self.weights_only is not False)
        except pickle.UnpicklingError as error:
            name = read_item.dest_index.fqn
            raise TPError(f"`{name}` of the checkpoint is no plain data, and is not read: {_first_line(error)}") from None
        again = io.BytesIO()  # torch's own way of putting it into its place unpickles without a limit: what is harmless by now
        torch.save(loaded, again)
        again.seek(0)
        super().load_bytes(read_item, again)


def dcp_load(
    state: dict[str, Any],
    folder: StoragePath,
    *,
    safe_globals: SafeGlobals = (),
    weights_only: bool | None = None,
    no_dist: bool = False,
) -> None:
    """Fill a state dict from the folder of a distributed checkpoint, on every rank with what it asks for. A collective.

    Raises:
        TPError: on every rank, if one of them can't.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            dcp.load(state, storage_reader=Reader(folder), planner=Planner(safe_globals, weights_only), no_dist=no_dist)
        except CheckpointException as error:
            rank, (first, _) = next(iter(error.failures.items()))
            words = str(first) if isinstance(first, TPError) else f"`{folder}` can't be read: {type(first).__name__}: {first}"
            raise TPError(words + (f" (rank {rank})" if rank else "")) from error
