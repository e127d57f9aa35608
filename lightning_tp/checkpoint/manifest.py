"""The manifest of a checkpoint folder: which run wrote it, and the length and checksum of every file. Written last.

A folder is complete if all files match its manifest. One without a manifest is Lightning's own: it is read unchecked.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from lightning_tp._compat import version_of
from lightning_tp.checkpoint.storage.path import MANIFEST, StoragePath
from lightning_tp.errors import TPError

FORMAT = 1
LATER = f"this version of lightning_tp reads format {FORMAT}"
_CHUNK = 1 << 22  # bytes that are read at a time


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint folder says of itself."""

    step: int = 0  # number of optimizer steps
    epoch: int = 0  # counted from 0
    mesh: dict[str, int] = field(default_factory=dict)  # the size of each axis, by name
    versions: dict[str, str] = field(default_factory=dict)  # of torch, lightning and this package
    weights_only: bool = False  # whether there is no optimizer state, so that training can't be resumed
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # for each file's path in the folder its "bytes" and "crc32"

    def to_json(self) -> str:
        """Return the text of `manifest.json`."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """Parse the text of `manifest.json`, which errors call `where`; `TPError` if it is none, or of a later format."""
        try:
            data = json.loads(text)
            form = data.pop("format")
            if form != FORMAT:
                raise TPError(f"`{where}` has format {form}, but {LATER}. Install the version that wrote it.")
            manifest = cls(**{name: data[name] for name in cls.__dataclass_fields__})
            [(int(entry["bytes"]), str(entry["crc32"])) for entry in manifest.files.values()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, TPError):
                raise
            raise TPError(f"`{where}` is damaged: it is no manifest ({type(error).__name__}: {error}).") from None
        return manifest


def versions() -> dict[str, str]:
    """Return the versions of the packages that write here."""
    lightning, ours = (version_of(package) or "unknown" for package in ("lightning", "lightning-tp"))
    return {"torch": str(torch.__version__), "lightning": lightning, "lightning_tp": ours}


def read(folder: StoragePath) -> Manifest | None:
    """Read the manifest of a folder; None if there is none, and `TPError` if it is damaged, or of a later format."""
    file = folder / MANIFEST
    return Manifest.from_json(file.read(), str(file)) if file.is_file() else None


def damage_of_file(folder: StoragePath, name: str, entry: Mapping[str, Any], *, checksums: bool = True) -> str | None:
    """Return what is wrong with a file that the manifest names; None if nothing is. Without `checksums` only its length is compared."""
    file = folder / name
    if not file.is_file():
        return f"`{name}` is missing ({entry['bytes']} bytes)"
    if (size := file.size()) != entry["bytes"]:
        return f"`{name}` has {size} bytes, but its manifest says {entry['bytes']}"
    if not checksums:
        return None
    crc = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return (
        None
        if f"{crc:08x}" == entry["crc32"]
        else f"`{name}` has checksum {crc:08x}, but its manifest says {entry['crc32']} (CRC-32)"
    )


def damage_of_archive(file: StoragePath, rank: int, num_ranks: int) -> str | None:
    """Return what is wrong with a checkpoint in one file, a zip archive with checksums of its own; each rank reads a share of its records.

    Raises:
        PermissionError: if it may not be read.
    """
    try:
        with file.open("rb") as stream:
            if not zipfile.is_zipfile(stream):
                stream.seek(0)
                if stream.read(2) in (b"\x80\x02", b"\x80\x03"):  # a pickle, as torch wrote before 1.6: nothing to check it by
                    return None
                return f"it has {file.size()} bytes, and is no archive of `torch.save`, or one that is cut off"
            stream.seek(0)
            with zipfile.ZipFile(stream) as archive:
                for record in archive.infolist()[rank::num_ranks]:
                    with archive.open(record) as content:
                        while content.read(_CHUNK):
                            pass
    except PermissionError:
        raise
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError) as error:
        return f"{error} (of {file.size() if file.is_file() else 0} bytes)"
    return None
