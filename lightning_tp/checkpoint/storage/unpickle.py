"""Load pickles without running what is in them: only what makes tensors and plain data may be called.

torch reads three pickles of a checkpoint folder: `.metadata`, whatever is in `meta.pt`, and each value that is no tensor. It unpickles the first
and the last without a limit. Here `.metadata` goes through an unpickler that knows the classes of distributed checkpoint only, and the others
(see `dcp.py` for the last) through `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from lightning_tp._compat import METADATA_CLASSES
from lightning_tp.checkpoint.storage.path import METADATA, StoragePath
from lightning_tp.errors import TPError

SafeGlobals = Sequence[Callable[..., Any]]


def load(file: StoragePath, *, safe_globals: SafeGlobals = (), weights_only: bool | None = None, mmap: bool = False) -> Any:
    """Load what `torch.save` wrote, onto the CPU.

    Args:
        file: where it is.
        safe_globals: classes besides torch's own that may be created.
        weights_only: False runs whatever the pickle says: for files that you trust. Default: True.
        mmap: leave tensors on the disk until they are read, where the file is local and in the format that torch writes since 1.6.

    Raises:
        TPError: if `torch.save` did not write it, it is damaged, or has classes in it that are not allowed; it names them.
    """
    safe = weights_only is not False
    with torch.serialization.safe_globals(list(safe_globals)):
        try:
            if file.is_local:
                mmap = mmap and zipfile.is_zipfile(file.path)
                return torch.load(file.path, map_location="cpu", weights_only=safe, mmap=mmap)
            with file.open("rb") as stream:
                return torch.load(stream, map_location="cpu", weights_only=safe)
        except pickle.UnpicklingError as error:
            if safe and (names := _not_allowed(file)):
                raise TPError(
                    f"`{file}` contains objects of {', '.join(f'`{name}`' for name in names)}, which are not loaded by default. If you know "
                    f"the class, allow it: `TPStrategy(safe_globals=[{names[0].rpartition('.')[2]}])`. If you trust the file, load it with "
                    "`weights_only=False` (`--trust` on the command line), which runs any code that is in it."
                ) from None
            raise TPError(f"`{file}` is no checkpoint that `torch.load` can read: {first_line(error)}") from None
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            raise TPError(f"`{file}` can't be read: {error.strerror}.") from None
        except Exception as error:  # of whatever stands there in the place of a checkpoint
            text = f"{type(error).__name__}: {first_line(error)}".rstrip(": .")
            raise TPError(f"`{file}` is no checkpoint that `torch.load` can read ({text}).") from None


def first_line(error: Exception) -> str:
    """Return the first line of an error's message: torch's go on with advice."""
    return str(error).strip().partition("\n")[0]


def _not_allowed(file: StoragePath) -> list[str]:
    """Name the classes in a file that `weights_only` refuses; none if they can't be found out."""
    try:
        if file.is_local:
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file.path))
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(file.read())))
    except Exception:  # it only makes the message better
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
            f"`{self._where}` would create an object of `{module}.{name}`, which has no place in the metadata of a distributed checkpoint. "
            "torch did not write it, or somebody changed it; nothing of it was loaded."
        )


def _as_text(*parts: str) -> str:
    return os.path.join(*parts) if parts else "."


def read_metadata(folder: StoragePath) -> Metadata:
    """Read the `.metadata` of a distributed checkpoint; `TPError` if there is none, it is damaged, or has something else in it."""
    file = folder / METADATA
    try:
        with file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream, str(file)).load()
    except (TPError, MemoryError):
        raise
    except FileNotFoundError:
        raise TPError(f"`{folder}` is no distributed checkpoint: there is no `{METADATA}` in it.") from None
    except PermissionError as error:
        raise TPError(f"`{file}` can't be read: {error.strerror}.") from None
    except Exception as error:  # a damaged pickle raises anything
        raise TPError(f"`{file}` is damaged: {type(error).__name__}: {error}.") from None
    if not isinstance(metadata, Metadata):
        raise TPError(f"`{file}` is damaged: a {type(metadata).__name__} is in it.")
    if getattr(metadata, "storage_meta", None) is None:
        metadata.storage_meta = StorageMeta()
    return metadata
