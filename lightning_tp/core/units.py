"""Format bytes, seconds, shares, parameter counts and FLOP rates for reading."""

from __future__ import annotations


def size(num_bytes: float) -> str:
    """Format a number of bytes, in powers of 1024.

    Example:
        >>> size(240), size(3 * 2**30)
        ('240 bytes', '3.00 GiB')
    """
    power = 0
    while abs(num_bytes) >= 1024 and power < 4:
        num_bytes /= 1024
        power += 1
    return f"{num_bytes:.{(0, 1, 1, 2, 2)[power]}f} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def seconds(s: float) -> str:
    """Format a duration given in seconds.

    Example:
        >>> seconds(0.0123)
        '12.3 ms'
    """
    return f"{s:.2f} s" if s >= 1 else f"{1e3 * s:.1f} ms" if s >= 1e-3 else f"{1e6 * s:.1f} us"


def share(part: float, total: float) -> str:
    """Format a part of a total as a percentage.

    Example:
        >>> share(3, 4)
        '75%'
    """
    return f"{part / max(1, total):.0%}"


def count(n: float) -> str:
    """Format a number of parameters or tokens, in powers of 1000.

    Example:
        >>> count(68.98e9)
        '69.0B'
    """
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= scale:
            return f"{n / scale:.1f}{unit}"
    return f"{n:.0f}"


def flop_rate(flops_per_s: float) -> str:
    """Format a rate in FLOP/s, in powers of 1000; the smallest unit is MFLOP/s.

    Example:
        >>> flop_rate(28e9)
        '28.0 GFLOP/s'
    """
    for unit, scale in (("PFLOP/s", 1e15), ("TFLOP/s", 1e12), ("GFLOP/s", 1e9)):
        if flops_per_s >= scale:
            return f"{flops_per_s / scale:.1f} {unit}"
    return f"{flops_per_s / 1e6:.1f} MFLOP/s"
