"""Write a checkpoint so that all of it is there, or nothing: beside its name, flushed to the disk, and then renamed (`core/staging.py`).

A store without renames has no such instant: files go to their place, the manifest last, and until then a mark says that the folder is not
complete.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from lightning_tp.checkpoint.manifest import Manifest
from lightning_tp.checkpoint.storage.dcp import Entries, FolderFiles, dcp_save
from lightning_tp.checkpoint.storage.path import MANIFEST, META, NAMES, PLAN, SHARDED, UNFINISHED, StoragePath
from lightning_tp.checkpoint.storage.streams import CountedStream
from lightning_tp.core import staging
from lightning_tp.core.comm.agree import Peers
from lightning_tp.core.staging import Staging
from lightning_tp.errors import TPError


@dataclass
class SaveContent:
    """What goes into a checkpoint folder."""

    sharded: dict[str, Any]  # DTensors, and plain data that all ranks have: "state_dict", "optimizer_0", ..
    apart: dict[str, DTensor] = field(default_factory=dict)  # DTensors that were found in the rest, by their paths in it
    rest: bytes | None = None  # `meta.pt` as the first rank writes it; None on the others
    plan: str | None = None  # `plan.json`, likewise
    about: Manifest = field(default_factory=Manifest)  # the manifest, without files


def save_folder(target: StoragePath, content: SaveContent, peers: Peers) -> None:
    """Write and commit a checkpoint folder, which is created or replaced. A collective.

    `TPError` on all ranks, if one of them could not write. What was there before is untouched then.
    """
    written = StoragePath(peers.from_first(lambda: _begin(target)), target.options)
    files = FolderFiles(written)
    problem = None
    try:
        _write(files, content, peers)
    except (Exception, CheckpointException) as error:  # torch's is no Exception
        problem = _reason(error, target, files)
    gathered: list[tuple[str | None, Entries]] = peers.gather((problem, files.entries))
    problems = [p for p, _ in gathered if p is not None]
    entries = {name: entry for _, of_rank in gathered for name, entry in of_rank.items()}

    def commit() -> None:
        try:
            if problems:  # of the others, some only saw that one fail
                raise TPError(next((p for p in problems if "no space" in p), problems[0]))
            _commit_folder(written, target, replace(content.about, files=dict(sorted(entries.items()))))
        except (OSError, TPError) as error:
            if target.is_local:
                Staging(target.local, written.local).discard()
            raise error if isinstance(error, TPError) else TPError(_reason(error, target, files)) from error

    peers.from_first(commit)


def save_file(target: StoragePath, write: Callable[[Any], None]) -> None:
    """Write and commit a checkpoint in one file, which is created or replaced, by `write(stream)`. Called by one rank.

    `TPError` if it can't be written. What was there before is untouched then.
    """
    stream: CountedStream | None = None
    try:
        if not target.is_local:
            with target.open("wb") as raw:  # a store shows an object when it is complete
                write(raw)
            return
        staging.recover(target.local, _is_complete)
        _refuse_other_things(target)
        with staging.staged(target.local, folder=False) as path, path.open("wb") as raw:
            stream = CountedStream(raw)
            write(stream)
    except (OSError, RuntimeError) as error:
        reason = stream.failed if stream is not None and stream.failed is not None else error
        raise TPError(_reason(reason, target, num_bytes=stream.num_bytes if stream is not None else 0)) from error


def remove(target: StoragePath) -> None:
    """Remove a checkpoint: its name is free at once, however long its files take. Do nothing if it is not there."""
    if not target.is_local or os.path.islink(target.path) or not os.path.isdir(target.path):
        target.remove()
        return
    try:
        staging.remove_at_once(target.local)
    except OSError as error:
        raise TPError(f"`{target}` could not be removed: {error.strerror or error}.") from error


def recover(target: StoragePath) -> None:
    """Bring a checkpoint back whose name a crash left without one, where the file system can't exchange names: the new one if it is complete."""
    if target.is_local:
        staging.recover(target.local, _is_complete)


def recoverable(folder: StoragePath) -> list[str]:
    """List the names that `recover` would bring back in this folder."""
    return staging.recoverable(folder.local) if folder.is_local else []


def is_unfinished(folder: StoragePath) -> bool:
    """Return whether this was begun in a store without renames, and never completed."""
    return (folder / UNFINISHED).is_file() and not (folder / MANIFEST).is_file()


def to_bytes(value: Any) -> bytes:
    """Return what `torch.save` writes."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _is_complete(path: Path) -> bool:
    return path.is_file() or (path / MANIFEST).is_file()


def _begin(target: StoragePath) -> str:
    """Make room for a folder, and return the path or URL to write to."""
    recover(target)
    _refuse_other_things(target)
    try:
        if target.is_local:
            return str(staging.begin(target.local, folder=True).path)
        target.make()
        with (target / UNFINISHED).open("wb") as stream:
            stream.write(b"until there is a manifest\n")
        for name in target.names():
            if name != UNFINISHED:
                (target / name).remove()
        return target.url
    except OSError as error:
        raise TPError(_reason(error, target)) from error


def _refuse_other_things(target: StoragePath) -> None:
    names = target.names() if target.is_dir() else []
    others = sorted(n for n in names if n not in NAMES and not n.endswith((".distcp", ".tmp")))
    if others:
        raise TPError(
            f"`{target}` is a folder with other things in it than a checkpoint ({', '.join(f'`{n}`' for n in others[:3])}"
            f"{', ..' if len(others) > 3 else ''}): saving there would remove them. Give another name, or move them away."
        )


def _write(files: FolderFiles, content: SaveContent, peers: Peers) -> None:
    dcp_save(content.sharded, files, peers)
    if content.apart:
        dcp_save(dict(content.apart), files, peers, inside=SHARDED)
    if peers.rank == 0:
        if content.rest is not None:
            files.write(META, content.rest)
        if content.plan is not None:
            files.write(PLAN, content.plan.encode())


def _commit_folder(written: StoragePath, target: StoragePath, manifest: Manifest) -> None:
    for name, entry in manifest.files.items():  # of the other ranks, too
        if not (written / name).is_file() or (written / name).size() != entry["bytes"]:
            raise TPError(
                f"`{target}`: another rank wrote `{name}`, which rank 0 does not see. Checkpoints need a file system that all ranks share."
            )
    FolderFiles(written).write(MANIFEST, manifest.to_json().encode())
    if target.is_local:
        Staging(target.local, written.local).commit()
    else:
        (target / UNFINISHED).remove()


def _reason(error: BaseException, target: StoragePath, files: FolderFiles | None = None, num_bytes: int = 0) -> str:
    """Say why a checkpoint could not be written: of torch's errors the first that comes from the disk."""
    if files is not None:
        num_bytes = sum(entry["bytes"] for entry in files.entries.values()) or files.num_bytes
    if files is not None and files.failed is not None:
        error = files.failed
    elif isinstance(error, CheckpointException):
        of_ranks = [e for e, _ in error.failures.values()]
        error = next((e for e in of_ranks if isinstance(e, OSError)), of_ranks[0])
    if isinstance(error, TPError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = "none"
        with suppress(OSError):
            free = f"{shutil.disk_usage(os.path.dirname(target.path)).free:,} bytes" if target.is_local else "none"
        return (
            f"`{target}` could not be written: no space left on the disk (a rank had written {num_bytes:,} bytes; {free} are free). "
            "Earlier checkpoints are untouched. Free some space, or keep fewer checkpoints (`ModelCheckpoint(save_top_k=..)`)."
        )
    return f"`{target}` could not be written: {type(error).__name__}: {error}. Earlier checkpoints are untouched."
