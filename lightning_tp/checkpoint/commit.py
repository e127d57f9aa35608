"""Writing a checkpoint so that it is there whole, or not at all: beside its name, down to the disk, and then renamed.

    <folder>/.lightning_tp/<name>.saving-<token>      while it is written; of a crash nothing but this is left
    <folder>/<name>                                   from one instant to the next; what had the name before is removed after that

Over an existing name the two change places at one instant (Linux `renameat2`). Where a file system can't, the old one is put aside as
`.lightning_tp/<name>.replaced-<token>` first, and `recover` completes what a crash between the two has left. A store without
renames has neither: files go to their place, the manifest last, and until then a mark says that the folder is not complete.
What is left of crashed saves goes away with the next save of the same name.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from lightning_tp._compat import rename_exchange
from lightning_tp.checkpoint.files import Files, Summed, Sums, Writer, total
from lightning_tp.checkpoint.manifest import MANIFEST, Manifest
from lightning_tp.checkpoint.storage import StoragePath
from lightning_tp.core.comm.agree import Peers
from lightning_tp.errors import TPError

ASIDE = ".lightning_tp"  # the folder beside checkpoints where they are made and unmade; Lightning looks into none that is hidden
UNFINISHED = ".lightning_tp_unfinished"  # the mark in a folder of a store without renames
ELSEWHERE = "lightning_tp_sharded"  # the folder inside for DTensors of callbacks
META, PLAN = "meta.pt", "plan.json"
_OURS = {".metadata", META, PLAN, MANIFEST, UNFINISHED, ELSEWHERE}


@dataclass
class SaveContent:
    """What goes into a checkpoint folder.

    Args:
        sharded: DTensors, and plain data that all ranks have: "state_dict", "optimizer_0", ..
        apart: DTensors that were found in the rest, by their keys.
        rest: `meta.pt` as the first rank writes it; None on the others.
        plan: `plan.json`, likewise.
        about: what the manifest says, without files.
    """

    sharded: dict[str, Any]
    apart: dict[str, DTensor] = field(default_factory=dict)
    rest: bytes | None = None
    plan: str | None = None
    about: Manifest = field(default_factory=Manifest)


def save_folder(target: StoragePath, content: SaveContent, world: Peers) -> None:
    """Write and commit a checkpoint folder. A collective of all ranks of `world`.

    Raises:
        TPError: on all ranks, if one of them could not write; what was there before is untouched then.
    """
    written = StoragePath(world.from_first(lambda: _begin(target)), target.options)
    files = Files(written)
    problem = None
    try:
        _write(files, content, world)
    except (OSError, RuntimeError, CheckpointException) as error:
        problem = _why(error, files, target)
    except TPError as error:
        problem = str(error)
    except Exception as error:
        problem = f"`{target}` could not be written: {type(error).__name__}: {error}"
    every: list[tuple[str | None, Sums]] = world.gather((problem, files.sums))
    problems = [p for p, _ in every if p is not None]
    sums = {name: of for _, part in every for name, of in part.items()}

    def commit() -> None:
        if problems:
            _undo(written, target)
            named = next((p for p in problems if "no space" in p), problems[0])  # of the others, some only saw that one fail
            raise TPError(named)
        try:
            _commit_folder(written, target, replace(content.about, files=dict(sorted(sums.items()))))
        except OSError as error:
            _undo(written, target)
            raise TPError(_why(error, files, target)) from error

    world.from_first(commit)


def save_file(target: StoragePath, write: Callable[[Any], None]) -> None:
    """Write and commit a checkpoint of one file: `write` gets the stream. By one rank.

    Raises:
        TPError: if it can't be written; what was there before is untouched then.
    """
    if not target.is_local:
        try:
            with target.open("wb") as stream:  # a store shows an object when it is whole
                write(stream)
        except OSError as error:
            raise TPError(_why(error, None, target)) from error
        return
    written = StoragePath(_begin(target, folder=False))
    summed: Summed | None = None
    try:
        with written.open("wb") as raw:
            summed = Summed(raw)
            write(summed)
            summed.flush()
            os.fsync(summed.fileno())
        _take_place(written, target)
    except (OSError, RuntimeError) as error:
        _undo(written, target)
        failed = summed.failed if summed is not None and summed.failed is not None else error
        raise TPError(_why(failed, None, target, summed.bytes if summed is not None else 0)) from error
    except BaseException:
        _undo(written, target)
        raise


@contextmanager
def file_beside(target: StoragePath) -> Iterator[Path]:
    """A path to write one file to, which is committed under the target's name at the end. By one rank.

    Raises:
        TPError: if it can't be written; what was there before is untouched then.
    """
    if not target.is_local:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "checkpoint"
            yield file
            with file.open("rb") as written:
                save_file(target, lambda stream: shutil.copyfileobj(written, stream))
        return
    made = StoragePath(_begin(target, folder=False))
    try:
        yield Path(made.path)
        made.sync()
        _take_place(made, target)
    except (OSError, RuntimeError) as error:
        size = made.size() if made.is_file() else 0
        _undo(made, target)
        raise TPError(_why(error, None, target, size)) from error
    except BaseException:
        _undo(made, target)
        raise


def remove(target: StoragePath) -> None:
    """Remove a checkpoint: it is gone from its name at once, however long its files take. Nothing happens if it is not there.

    Raises:
        TPError: if it can't be.
    """
    if not target.is_local or os.path.islink(target.path) or not os.path.isdir(target.path):
        target.remove()
        return
    aside = _aside(target, "removed")
    try:
        os.makedirs(os.path.dirname(aside), exist_ok=True)
        os.rename(target.path, aside)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise TPError(f"`{target}` could not be removed: {error.strerror or error}.") from error
    StoragePath(aside).remove()
    _leave(target)


def recover(target: StoragePath) -> None:
    """Complete what a crash has left where the name had to be given away for a moment (a file system without an exchange of names)."""
    if not target.is_local or os.path.lexists(target.path):
        return
    for name, kind, token in _left(target):
        if kind == "replaced":
            new = StoragePath(f"{_folder(target)}/{target.name}.saving-{token}")
            whole = new.is_file() or (new / MANIFEST).is_file()
            os.rename(new.path if whole else f"{_folder(target)}/{name}", target.path)
            return


def put_aside(folder: StoragePath) -> list[str]:
    """The names that `recover` would bring back in this folder."""
    found = [_parts(name) for name in (folder / ASIDE).names()] if folder.is_local else []
    names = {parts[0] for parts in found if parts is not None and parts[1] == "replaced"}
    return sorted(name for name in names if not os.path.lexists(f"{folder.path}/{name}"))


def is_unfinished(folder: StoragePath) -> bool:
    """Whether this was begun in its place, and never completed."""
    return (folder / UNFINISHED).is_file() and not (folder / MANIFEST).is_file()


# ----------------------------------------------------------------------------------------------------------------- steps


def _begin(target: StoragePath, *, folder: bool = True) -> str:
    """Make room: what is written goes to this path."""
    recover(target)
    others = sorted(
        n for n in (target.names() if target.is_dir() else []) if n not in _OURS and not n.endswith((".distcp", ".tmp"))
    )
    if others:
        raise TPError(
            f"`{target}` is a folder with other things in it than a checkpoint ({', '.join(f'`{n}`' for n in others[:3])}"
            f"{', ..' if len(others) > 3 else ''}): saving there would remove them. Give another name, or move them away."
        )
    try:
        if not target.is_local:
            target.make()
            with (target / UNFINISHED).open("wb") as stream:
                stream.write(b"until there is a manifest\n")
            for name in target.names():
                if name != UNFINISHED:
                    (target / name).remove()
            return target.url
        for name, _, _ in _left(target):
            StoragePath(f"{_folder(target)}/{name}").remove()
        path = _aside(target, "saving")
        os.makedirs(path if folder else os.path.dirname(path), exist_ok=True)
    except OSError as error:
        raise TPError(_why(error, None, target)) from error
    return path


def _write(files: Files, content: SaveContent, world: Peers) -> None:
    alone = world.size == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save(content.sharded, storage_writer=Writer(files), process_group=world.group, no_dist=alone)
        if content.apart:
            dcp.save(dict(content.apart), storage_writer=Writer(files, ELSEWHERE), process_group=world.group, no_dist=alone)
    if world.rank == 0:
        if content.rest is not None:
            files.write(META, content.rest)
        if content.plan is not None:
            files.write(PLAN, content.plan.encode())


def _commit_folder(written: StoragePath, target: StoragePath, manifest: Manifest) -> None:
    for name, said in manifest.files.items():  # of the other ranks, too
        if not (written / name).is_file() or (written / name).size() != said["bytes"]:
            raise TPError(
                f"`{target}`: another rank has written `{name}`, which rank 0 does not see. Checkpoints need a file system that all ranks share."
            )
    Files(written).write(MANIFEST, manifest.to_json().encode())
    if not target.is_local:
        (target / UNFINISHED).remove()
        return
    if (written / ELSEWHERE).is_dir():
        (written / ELSEWHERE).sync()
    written.sync()
    _take_place(written, target)


def _take_place(written: StoragePath, target: StoragePath) -> None:
    """Give the target's name to what was written, at one instant, and remove what had it."""
    written.parent.sync()
    kinds = [stat.S_IFMT(os.lstat(p).st_mode) if os.path.lexists(p) else None for p in (written.path, target.path)]
    if kinds[1] is None or kinds[0] == kinds[1] == stat.S_IFREG:
        os.replace(written.path, target.path)
        target.parent.sync()
    elif rename_exchange(written.path, target.path):
        target.parent.sync()
        written.remove()
    else:
        replaced = written.path.replace(f"{target.name}.saving-", f"{target.name}.replaced-")
        os.rename(target.path, replaced)
        os.rename(written.path, target.path)
        target.parent.sync()
        StoragePath(replaced).remove()
    _leave(target)


def _undo(written: StoragePath, target: StoragePath) -> None:
    if target.is_local:
        written.remove()
        _leave(target)


def _leave(target: StoragePath) -> None:
    with suppress(OSError):
        os.rmdir(_folder(target))  # if nothing else is in it


def _folder(target: StoragePath) -> str:
    return os.path.join(os.path.dirname(target.path), ASIDE)


def _aside(target: StoragePath, kind: str) -> str:
    return f"{_folder(target)}/{target.name}.{kind}-{secrets.token_hex(4)}"


def _parts(entry: str) -> tuple[str, str, str] | None:
    """(the target's name, saving | replaced | removed, token)."""
    name, _, last = entry.rpartition(".")
    kind, _, token = last.partition("-")
    return (name, kind, token) if name and kind in ("saving", "replaced", "removed") else None


def _left(target: StoragePath) -> list[tuple[str, str, str]]:
    """(entry, kind, token) of what is aside of this target's name; of what was being removed, of all."""
    entries = StoragePath(_folder(target)).names()
    found = [(entry, parts) for entry in entries if (parts := _parts(entry)) is not None]
    return [(entry, kind, token) for entry, (name, kind, token) in found if name == target.name or kind == "removed"]


def _why(error: BaseException, files: Files | None, target: StoragePath, written: int = 0) -> str:
    """What a failed write comes down to, in words."""
    if isinstance(error, CheckpointException):
        first = next((e for e, _ in error.failures.values() if isinstance(e, OSError)), next(iter(error.failures.values()))[0])
        error = first if files is None or files.failed is None else files.failed
    elif files is not None and files.failed is not None:
        error = files.failed
    if files is not None:
        written = written or total(files.sums) or files.bytes
    if isinstance(error, TPError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"`{target}` could not be written: no space is left on its disk (a rank had written {written:,} bytes; "
            f"{_free(target)} bytes were free for the rest). The checkpoints before it are untouched. Make room, or keep fewer "
            "(`ModelCheckpoint(save_top_k=..)`)."
        )
    return f"`{target}` could not be written: {type(error).__name__}: {error}. The checkpoints before it are untouched."


def _free(target: StoragePath) -> str:
    with suppress(OSError):
        return f"{shutil.disk_usage(os.path.dirname(target.path)).free:,}" if target.is_local else "no"
    return "no"


def to_bytes(value: Any) -> bytes:
    """As `torch.save` writes it."""
    import io

    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()
