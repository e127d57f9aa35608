"""Check, write, flush and remove files of this machine."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

from lightning_tp.errors import TPError


def check_file(path: str | Path, option: str = "") -> None:
    """Check that a file can be written to `path`, before the work whose result it is to hold.

    Args:
        path: where the file will be; the folder around it has to exist.
        option: the option that named it, for the error.

    Raises:
        TPError: if it is a folder, there is no folder for it, or it is not writable.
    """
    where = Path(path)
    what = f"`{option or 'path'} {path}`: "
    if where.is_dir():
        raise TPError(f"{what}this is a folder. Give the name of a file.")
    if not where.parent.is_dir():
        raise TPError(f"{what}there is no folder {where.parent}. Create it first.")
    is_new = not where.exists()
    try:
        with where.open("ab"):  # permissions don't tell: the file system may be read-only
            pass
    except OSError as error:
        raise TPError(f"{what}it can't be written: {error.strerror}.") from None
    if is_new:
        where.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, in place.

    Raises:
        TPError: if the file can't be written.
    """
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise TPError(f"`{path}` can't be written: {error.strerror}.") from None


def fsync(path: str | Path) -> None:
    """Flush a file to the disk, or the names in a folder; file systems that can't flush a folder are passed over.

    Raises:
        OSError: if the disk is full or fails.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not os.path.isdir(path) or error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
    finally:
        os.close(descriptor)


def remove(path: str | Path) -> None:
    """Remove a file, a link or a folder with all that is in it; do nothing if it is not there."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(path)
