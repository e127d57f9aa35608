from __future__ import annotations

import pytest

from lightning_tp.core.units import count, flop_rate, seconds, share, size


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (3 * 2**19, "1.5 MiB"),
        (1023 * 2**20, "1023.0 MiB"),
        (2**30, "1.00 GiB"),
        (5 * 2**39, "2.50 TiB"),
        (2**51, "2048.00 TiB"),
        (-3 * 2**10, "-3.0 KiB"),
    ],
)
def test_size(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text


@pytest.mark.parametrize(("s", "text"), [(90, "90.00 s"), (1, "1.00 s"), (0.5, "500.0 ms"), (1e-3, "1.0 ms"), (2.5e-6, "2.5 us")])
def test_seconds(s: float, text: str) -> None:
    assert seconds(s) == text


def test_share_of_nothing_is_nothing() -> None:
    assert (share(1, 3), share(0, 0)) == ("33%", "0%")


@pytest.mark.parametrize(("n", "text"), [(999, "999"), (1000, "1.0k"), (7.5e6, "7.5M"), (1e9, "1.0B"), (2.2e12, "2.2T")])
def test_count(n: float, text: str) -> None:
    assert count(n) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(5e4, "0.1 MFLOP/s"), (1e9, "1.0 GFLOP/s"), (989e12, "989.0 TFLOP/s"), (1e15, "1.0 PFLOP/s")]
)
def test_flop_rate(rate: float, text: str) -> None:
    assert flop_rate(rate) == text
