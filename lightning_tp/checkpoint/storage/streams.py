"""Streams that know how much was written to them, and what it sums up to."""

from __future__ import annotations

import zlib
from typing import Any


class CountedStream:
    """A binary stream that counts its bytes, and remembers why the disk refused one: torch's writer raises a RuntimeError without the reason."""

    def __init__(self, raw: Any) -> None:
        self.raw, self.num_bytes = raw, 0
        self.failed: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of it."""
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):  # an unbuffered file may take less
                done += self.raw.write(view[done:] if done else view)
        except OSError as error:
            self.failed = self.failed or error
            raise
        self.num_bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        try:
            self.raw.flush()
        except OSError as error:
            self.failed = self.failed or error
            raise

    def tell(self) -> int:
        """Return where the next byte goes."""
        return self.num_bytes

    def fileno(self) -> int:
        """Return the file's descriptor."""
        descriptor: int = self.raw.fileno()
        return descriptor

    def close(self) -> None:
        """Do nothing: whoever opened the file closes it."""


class ChecksumStream(CountedStream):
    """A counted stream that sums its bytes, too (CRC-32)."""

    def __init__(self, raw: Any) -> None:
        super().__init__(raw)
        self.crc = 0

    def write(self, data: Any) -> int:
        """Write all of it."""
        n = super().write(data)
        self.crc = zlib.crc32(data, self.crc)
        return n

    @property
    def entry(self) -> dict[str, Any]:
        """What a manifest says of the file."""
        return {"bytes": self.num_bytes, "crc32": f"{self.crc:08x}"}
