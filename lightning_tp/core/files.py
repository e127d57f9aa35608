"""Check the path of a file to be written, and write text."""

from __future__ import annotations

from pathlib import Path

from lightning_tp.errors import TPError


def check_file(path: str | Path, option: str = "") -> None:
    """Whether a file can be written there.

    Raises:
        TPError: if it is a folder, there is no folder for it, or one may not write.
    """
    where = Path(path)
    what = f"`{option or 'path'} {path}`: "
    if where.is_dir():
        raise TPError(f"{what}this is a folder; name a file.")
    if not where.parent.is_dir():
        raise TPError(f"{what}there is no folder {where.parent}. Make it first.")
    is_new = not where.exists()
    try:
        with where.open("ab"):  # permissions don't tell: the file system may be read-only
            pass
    except OSError as error:
        raise TPError(f"{what}it can't be written: {error.strerror}.") from None
    if is_new:
        where.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write a file.

    Raises:
        TPError: if it can't be.
    """
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise TPError(f"`{path}` can't be written: {error.strerror}.") from None
