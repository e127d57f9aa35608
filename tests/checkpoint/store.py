"""A file system as an object store, for tests."""

from __future__ import annotations

import os
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

OPTIONS = {"key": "secret"}


class Store(LocalFileSystem):
    """As object stores are: files appear whole, and there are no renames. Wants a key. It lies on the disk, so that all ranks see it."""

    protocol = "store"
    cachable = False

    def __init__(self, key: str = "", **options: Any) -> None:
        super().__init__(auto_mkdir=True, **options)
        if key != "secret":
            raise PermissionError("no key")

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return LocalFileSystem._strip_protocol(os.fspath(path).removeprefix("store://"))


@pytest.fixture(autouse=True)
def stores() -> None:
    """`store://` is known, and `memory://` is empty."""
    fsspec.register_implementation("store", Store, clobber=True)
    fsspec.filesystem("memory").store.clear()
