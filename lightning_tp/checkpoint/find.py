"""Which checkpoint to load: one that is whole. What is damaged is found, and named, before anything of it is read.

Each rank checks a share of the files against the manifest; what one finds, all know.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from lightning_tp.checkpoint.commit import META, is_unfinished, put_aside, recover
from lightning_tp.checkpoint.manifest import LATER, MANIFEST, Manifest, damage_of_archive, damage_of_file, read
from lightning_tp.checkpoint.storage import StoragePath
from lightning_tp.core.comm.agree import Peers
from lightning_tp.errors import TPError

SUFFIX = ".ckpt"
_NONE = "it is no checkpoint"
_CLOSED = "it can't be read"


def damage(place: StoragePath, world: Peers) -> str | None:
    """What is wrong with a checkpoint, the same on all ranks; None: nothing, or nothing that could be known. A collective."""

    def look() -> tuple[str | None, Manifest | None, bool]:
        if place.is_file():
            return None, None, True
        if place.is_local and os.path.exists(place.path) and not os.access(place.path, os.R_OK | os.X_OK):
            return f"{_CLOSED}: no permission", None, False
        if not place.is_dir():
            return f"{_NONE}: there is nothing of this name", None, False
        if is_unfinished(place):
            return "it was begun, and never completed: there is no manifest yet", None, False
        try:
            found = read(place)
        except TPError as error:
            return str(error), None, False
        except OSError as error:
            return f"{_CLOSED}: {error.strerror or error} ({error.filename})", None, False
        if found is None and not place.has(META):
            return f"{_NONE}: neither a file nor a folder with `{META}` in it", None, False
        return None, found, False

    problem, manifest, is_file = world.from_first(look)
    if problem is not None:
        return problem
    try:
        if is_file:
            mine = damage_of_archive(place, world.rank, world.size)
        elif manifest is None:
            return None
        else:
            largest_first = sorted(manifest.files, key=lambda name: -int(manifest.files[name]["bytes"]))
            problems = (damage_of_file(place, name, manifest.files[name]) for name in largest_first[world.rank :: world.size])
            mine = next((p for p in problems if p is not None), None)
    except OSError as error:
        mine = f"{_CLOSED}: {error.strerror or error} ({error.filename})"
    return world.first_message(mine)


def candidates(folder: StoragePath) -> list[StoragePath]:
    """What has a checkpoint's name in a folder, the newest first."""
    names = {name for name in folder.names() if name.endswith(SUFFIX) or (folder / name / MANIFEST).is_file()}
    places = [folder / name for name in sorted({n for n in names if not n.startswith(".")} | set(put_aside(folder)))]
    found = [(_changed(place), place) for place in places]
    return [place for _, place in sorted(found, key=lambda pair: -pair[0])]


def newest_complete(folder: StoragePath, world: Peers, *, but: Iterable[str] = ()) -> StoragePath | None:
    """The newest checkpoint of a folder that is whole, the same on all ranks. A collective.

    Args:
        folder: where to look.
        world: who looks.
        but: paths that are known not to be.
    """
    skipped = set(but)
    urls = world.from_first(lambda: [place.url for place in candidates(folder) if place.path not in skipped])
    for url in urls:
        place = StoragePath(url, folder.options)
        world.from_first(lambda place=place: recover(place))  # type: ignore[misc]
        if damage(place, world) is None:
            return place
    return None


def newer(place: StoragePath) -> StoragePath:
    """A checkpoint beside this one that was written later, and is further: a run was stopped before it could be called the last. Else this one."""
    step = _step(place)
    if step is None:
        return place
    for other in candidates(place.parent):
        if _changed(other) < _changed(place):
            break
        if (further := _step(other)) is not None and further > step:
            return other
    return place


def _step(place: StoragePath) -> int | None:
    try:
        manifest = read(place)
    except TPError:
        return None
    return manifest.step if manifest is not None else None


def select_intact(place: StoragePath, world: Peers, *, instead: Sequence[str] | None = None) -> tuple[StoragePath, str | None]:
    """The checkpoint to load, which is whole: the one that was asked for, or another one if that may be. A collective.

    Args:
        place: the one that was asked for.
        world: who loads.
        instead: whether another one will do (it was asked for as the last, or the best), and which to try first; None: no other one.

    Returns:
        It, and a line to say if it is another one.

    Raises:
        TPError: on all ranks, if it is damaged: what is wrong with it, and which one of its folder is whole.
    """
    world.from_first(lambda: recover(place))
    problem = damage(place, world)
    if problem is None:
        return place, None
    problem = problem.removesuffix(".")
    if problem.startswith(_NONE):
        said = f"`{place}` is no checkpoint{problem.removeprefix(_NONE)}."
    elif problem.startswith(_CLOSED):
        said = f"The checkpoint `{place}` can't be read{problem.removeprefix(_CLOSED)}."
    elif LATER in problem:
        said = f"The checkpoint `{place}` can't be read: {problem}."
    else:
        said = f"The checkpoint `{place}` is damaged: {problem}."
    other = None
    for path in instead or ():
        one = StoragePath(path, place.options)
        if one.path != place.path and damage(one, world) is None:
            other = one
            break
    other = other or newest_complete(place.parent, world, but=[place.path])
    if instead is None or other is None:
        newest = (
            f"The newest one there that is whole is `{other}`."
            if other is not None
            else "There is no other one there that is whole."
        )
        raise TPError(f"{said} Nothing of it was loaded. {newest}")
    return other, f"{said} `{other}` is loaded in its place."


def _changed(place: StoragePath) -> float:
    inside = place / MANIFEST
    return inside.changed() if inside.is_file() else place.changed()
