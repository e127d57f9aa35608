"""Find the checkpoint to load: an intact one. What is damaged is found, and named, before anything of it is loaded.

Each rank checks a share of the files against the manifest; what one rank finds, all know.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from lightning_tp.checkpoint.commit import is_unfinished, recover, recoverable
from lightning_tp.checkpoint.manifest import LATER, Manifest, damage_of_archive, damage_of_file, read
from lightning_tp.checkpoint.storage.path import MANIFEST, META, StoragePath
from lightning_tp.core.comm.agree import Peers
from lightning_tp.errors import TPError

SUFFIX = ".ckpt"
_NONE = "it is no checkpoint"
_CLOSED = "it can't be read"


def damage(path: StoragePath, peers: Peers) -> str | None:
    """Return what is wrong with a checkpoint, the same on all ranks; None if nothing is, or could be known. A collective."""
    problem, manifest, is_file = peers.from_first(lambda: _first_look(path))
    if problem is not None:
        return problem
    mine: str | None = None
    try:
        if is_file:
            mine = damage_of_archive(path, peers.rank, peers.size)
        elif manifest is None:
            return None
        else:
            largest_first = sorted(manifest.files, key=lambda name: -int(manifest.files[name]["bytes"]))
            problems = (damage_of_file(path, name, manifest.files[name]) for name in largest_first[peers.rank :: peers.size])
            mine = next((p for p in problems if p is not None), None)
    except OSError as error:
        mine = f"{_CLOSED}: {error.strerror or error} ({error.filename})"
    return peers.first_message(mine)


def _first_look(path: StoragePath) -> tuple[str | None, Manifest | None, bool]:
    """Return (what is wrong before any file is read, the manifest, whether it is one file)."""
    if path.is_file():
        return None, None, True
    if path.is_local and os.path.exists(path.path) and not os.access(path.path, os.R_OK | os.X_OK):
        return f"{_CLOSED}: permission denied", None, False
    if not path.is_dir():
        return f"{_NONE}: there is no such file or folder", None, False
    if is_unfinished(path):
        return "its save was never completed: there is no manifest", None, False
    try:
        manifest = read(path)
    except TPError as error:
        return str(error), None, False
    except OSError as error:
        return f"{_CLOSED}: {error.strerror or error} ({error.filename})", None, False
    if manifest is None and not (path / META).is_file():
        return f"{_NONE}: neither a file nor a folder with `{META}` in it", None, False
    return None, manifest, False


def candidates(folder: StoragePath) -> list[StoragePath]:
    """List what has a checkpoint's name in a folder, the newest first."""
    names = {name for name in folder.names() if name.endswith(SUFFIX) or (folder / name / MANIFEST).is_file()}
    paths = [folder / name for name in sorted({n for n in names if not n.startswith(".")} | set(recoverable(folder)))]
    found = [(_modified(path), path) for path in paths]
    return [path for _, path in sorted(found, key=lambda pair: -pair[0])]


def newest_intact(folder: StoragePath, peers: Peers, skip: str) -> StoragePath | None:
    """Return the newest intact checkpoint of a folder, other than `skip`, the same on all ranks; None without one. A collective."""
    urls = peers.from_first(lambda: [path.url for path in candidates(folder) if path.path != skip])
    for url in urls:
        path = StoragePath(url, folder.options)
        peers.from_first(lambda path=path: recover(path))  # type: ignore[misc]
        if damage(path, peers) is None:
            return path
    return None


def newer(path: StoragePath) -> StoragePath:
    """Return a checkpoint beside this one that was written later, at a later step: a run was stopped before it could be called the last one.

    Without one, return this one.
    """
    step = _step(path)
    if step is None:
        return path
    for other in candidates(path.parent):
        if _modified(other) < _modified(path):
            break
        if (further := _step(other)) is not None and further > step:
            return other
    return path


def _step(path: StoragePath) -> int | None:
    try:
        manifest = read(path)
    except TPError:
        return None
    return manifest.step if manifest is not None else None


def select_intact(path: StoragePath, peers: Peers, *, instead: Sequence[str] | None = None) -> tuple[StoragePath, str | None]:
    """Return an intact checkpoint to load: the one that was asked for, or another one where that is allowed. A collective.

    Args:
        path: the one that was asked for.
        peers: the ranks that load it.
        instead: None if no other one will do. Else (it was asked for as the last or the best) which to try first; the newest comes after them.

    Returns:
        The checkpoint, and a message for the user if it is another one.

    Raises:
        TPError: on all ranks, if it is damaged: what is wrong with it, and which one in its folder is intact.
    """
    peers.from_first(lambda: recover(path))
    problem = damage(path, peers)
    if problem is None:
        return path, None
    problem = problem.removesuffix(".")
    if problem.startswith(_NONE):
        message = f"`{path}` is no checkpoint{problem.removeprefix(_NONE)}."
    elif problem.startswith(_CLOSED):
        message = f"The checkpoint `{path}` can't be read{problem.removeprefix(_CLOSED)}."
    elif LATER in problem:
        message = f"The checkpoint `{path}` can't be read: {problem}."
    else:
        message = f"The checkpoint `{path}` is damaged: {problem}."
    preferred = (StoragePath(other, path.options) for other in instead or ())
    other = next((p for p in preferred if p.path != path.path and damage(p, peers) is None), None)
    other = other or newest_intact(path.parent, peers, path.path)
    if other is None:
        raise TPError(f"{message} Nothing was loaded. There is no intact checkpoint beside it.")
    if instead is None:
        raise TPError(f"{message} Nothing was loaded. The newest intact checkpoint beside it is `{other}`.")
    return other, f"{message} `{other}` is loaded instead."


def _modified(path: StoragePath) -> float:
    inside = path / MANIFEST
    return inside.modified() if inside.is_file() else path.modified()
