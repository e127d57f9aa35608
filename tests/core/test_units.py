"""Bytes, times, shares and counts for reading: which unit, how many digits."""

from __future__ import annotations

import pytest

from lightning_tp.core.units import count, seconds, share, size


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (-1536, "-1.5 KiB"), (2**20, "1.0 MiB"), (2**30, "1.00 GiB"),
        (5000 * 2**30, "5000.00 GiB"),
    ],
)  # fmt: skip
def test_bytes(n: float, text: str) -> None:
    assert size(n) == text


@pytest.mark.parametrize(("s", "text"), [(90, "90.00 s"), (1, "1.00 s"), (0.9994, "999.4 ms"), (1e-3, "1.0 ms"), (2e-6, "2.0 us")])
def test_times(s: float, text: str) -> None:
    assert seconds(s) == text


def test_shares() -> None:
    assert share(1, 3) == "33%" and share(2, 2) == "100%" and share(0, 0) == "0%"


@pytest.mark.parametrize(("n", "text"), [(999, "999"), (1000, "1.0k"), (7e6, "7.0M"), (68.98e9, "69.0B"), (1.2e12, "1.2T")])
def test_counts(n: float, text: str) -> None:
    assert count(n) == text
