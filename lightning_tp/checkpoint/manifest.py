"""The manifest of a checkpoint folder: which run wrote it, and every file's length and checksum. Written last.

A folder whose manifest's files all match is complete. One without a manifest is of Lightning's own strategies, or of an older version of
this package: it is read unchecked.
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
from lightning_tp.checkpoint.storage import StoragePath
from lightning_tp.errors import TPError

MANIFEST = "manifest.json"
FORMAT = 1
LATER = f"this version of lightning_tp reads {FORMAT}"
_PIECE = 1 << 22  # bytes that are read at a time


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint folder says of itself.

    Args:
        step: of the optimizer.
        epoch: counted from 0.
        mesh: the axes' sizes, by name.
        versions: of torch, lightning and this package.
        weights_only: whether training can't go on from it.
        files: for each file's path in the folder, its "bytes" and "crc32".

    Example:
        >>> manifest = Manifest(step=3, epoch=0, files={"meta.pt": {"bytes": 5, "crc32": "0f3a91c2"}})
        >>> Manifest.from_json(manifest.to_json(), "here") == manifest
        True
    """

    step: int = 0
    epoch: int = 0
    mesh: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    weights_only: bool = False
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> str:
        """As it is written."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """The inverse of `to_json`.

        Raises:
            TPError: if it is none, or of a later format.
        """
        try:
            data = json.loads(text)
            form = data.pop("format")
            if form != FORMAT:
                raise TPError(f"`{where}` has the format {form}, and {LATER}. Install the version that wrote it.")
            known = {name: data[name] for name in cls.__dataclass_fields__}
            manifest = cls(**known)
            [(int(of["bytes"]), str(of["crc32"] if "crc32" in of else of["sha256"])) for of in manifest.files.values()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, TPError):
                raise
            raise TPError(f"`{where}` is damaged: it is no manifest ({type(error).__name__}: {error}).") from None
        return manifest


def versions() -> dict[str, str]:
    """What writes here."""
    found = {"torch": str(torch.__version__)}
    for name, package in (("lightning", "lightning"), ("lightning_tp", "lightning-tp")):
        found[name] = version_of(package) or "unknown"
    return found


def read(folder: StoragePath) -> Manifest | None:
    """The manifest of a folder, None if there is none.

    Raises:
        TPError: if it can't be read.
    """
    file = folder / MANIFEST
    return Manifest.from_json(file.read(), str(file)) if file.is_file() else None


def damage_of_file(folder: StoragePath, name: str, said: Mapping[str, Any]) -> str | None:
    """What is wrong with a file that the manifest names; None: nothing."""
    file = folder / name
    if not file.is_file():
        return f"`{name}` is missing ({said['bytes']} bytes)"
    if (size := file.size()) != said["bytes"]:
        return f"`{name}` has {size} bytes, and its manifest says {said['bytes']}"
    kind = "crc32" if "crc32" in said else "sha256"
    found = checksum(file, kind)
    return None if found == said[kind] else f"`{name}` has the checksum {found}, and its manifest says {said[kind]} ({kind})"


def checksum(file: StoragePath, kind: str = "crc32") -> str:
    """Of the whole file, in hex."""
    import hashlib

    digest, crc = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while piece := stream.read(_PIECE):
            if kind == "crc32":
                crc = zlib.crc32(piece, crc)
            else:
                digest.update(piece)
    return f"{crc:08x}" if kind == "crc32" else digest.hexdigest()


def damage_of_archive(file: StoragePath, rank: int, world: int) -> str | None:
    """What is wrong with a checkpoint in one file, which is a zip archive with checksums of its own: this rank's share of its records.

    Raises:
        PermissionError: if it can't be looked at.
    """
    try:
        with file.open("rb") as stream:
            if not zipfile.is_zipfile(stream):
                stream.seek(0)
                if stream.read(2) in (b"\x80\x02", b"\x80\x03"):  # a pickle, as torch wrote before 1.6: nothing to check it by
                    return None
                return f"it has {file.size()} bytes, and is no archive of torch's, or one without its end"
            stream.seek(0)
            with zipfile.ZipFile(stream) as archive:
                for record in archive.infolist()[rank::world]:
                    with archive.open(record) as content:
                        while content.read(_PIECE):
                            pass
    except PermissionError:
        raise
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError) as error:
        return f"{error} (of {file.size() if file.is_file() else 0} bytes)"
    return None
