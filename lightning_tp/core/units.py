"""Format bytes, seconds, shares and counts for reading."""

from __future__ import annotations


def size(n: float) -> str:
    """Bytes, for reading.

    Example:
        >>> size(3 * 2**30)
        '3.00 GiB'
    """
    for unit in ("bytes", "KiB", "MiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"


def seconds(s: float) -> str:
    """A time, for reading.

    Example:
        >>> seconds(0.0123)
        '12.3 ms'
    """
    return f"{s:.2f} s" if s >= 1 else f"{1e3 * s:.1f} ms" if s >= 1e-3 else f"{1e6 * s:.1f} us"


def share(n: float, total: float) -> str:
    """A part, for reading."""
    return f"{n / max(1, total):.0%}"


def count(n: float) -> str:
    """A number of parameters, for reading.

    Example:
        >>> count(68.98e9)
        '69.0B'
    """
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= scale:
            return f"{n / scale:.1f}{unit}"
    return f"{n:.0f}"
