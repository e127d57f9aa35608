"""Streams that count, sum, and remember why the disk refused."""

from __future__ import annotations

import io
import zlib
from typing import Any

import pytest
import torch

from lightning_tp.checkpoint.storage.streams import ChecksumStream, CountedStream


class Slow(io.BytesIO):
    """As an unbuffered file: takes 7 bytes at a time."""

    def write(self, data: Any) -> int:
        return super().write(bytes(data[:7]))


def test_all_of_it_is_written_counted_and_summed() -> None:
    stream, data = ChecksumStream(raw := Slow()), bytes(range(40))
    assert stream.write(data[:25]) == 25 and stream.write(memoryview(data)[25:]) == 15
    assert raw.getvalue() == data and stream.tell() == stream.num_bytes == 40
    assert stream.entry == {"bytes": 40, "crc32": f"{zlib.crc32(data):08x}"}
    stream.close()
    assert not raw.closed


def test_numbers_are_written_as_bytes() -> None:
    stream = CountedStream(io.BytesIO())
    assert stream.write(memoryview(torch.ones(4).numpy())) == 16


@pytest.mark.parametrize("call", ["write", "flush"])
def test_the_first_reason_is_remembered(call: str) -> None:
    class Broken(io.BytesIO):
        errors = iter([OSError(28, "first"), OSError(5, "second")])

        def write(self, data: Any) -> int:
            raise next(self.errors)

        def flush(self) -> None:
            raise next(self.errors)

    stream = CountedStream(Broken())
    for _ in range(2):
        with pytest.raises(OSError):
            stream.write(b"abc") if call == "write" else stream.flush()
    assert str(stream.failed) == "[Errno 28] first" and stream.num_bytes == 0
    stream.raw = io.BytesIO()


def test_torch_saves_to_one() -> None:
    stream = CountedStream(raw := io.BytesIO())
    torch.save({"w": torch.ones(100)}, stream)
    assert stream.num_bytes == len(raw.getvalue()) and torch.load(io.BytesIO(raw.getvalue()))["w"].sum() == 100
