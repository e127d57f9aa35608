"""Time the matmuls that `shapes` lists on the device that is there.

Each distinct matmul runs in its true size and in the layout of its role (forward: a weight read transposed; gradient of a weight: an input read
transposed), in rounds over all of them, so that what else runs on the machine slows all alike; the fastest round counts. Matmuls that would take
too long or need too much memory are left out, and listed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_tp.core.tables import table
from lightning_tp.core.units import size
from lightning_tp.errors import TPError
from lightning_tp.estimate.cost.gemm_tiling import tiling
from lightning_tp.estimate.cost.hardware import Hardware, guess, hardware
from matmul_study.products import MatmulShape
from matmul_study.report import Shapes, StudyPoint

ROUNDS = 5  # at most
FEWEST = 3  # rounds that have to fit into the time
LAYOUTS = {"forward": "x @ w.T", "recompute": "x @ w.T", "grad of weight": "x.T @ g"}  # by role; "g @ w" for others


class ProductKey(NamedTuple):
    """What distinguishes matmuls for a device: sizes and layout."""

    layout: str
    batch: int
    m: int
    n: int
    k: int

    @property
    def flops(self) -> int:
        """FLOPs; a multiply-add counts as two."""
        return 2 * self.batch * self.m * self.n * self.k

    def bytes(self, itemsize: int) -> int:
        """Return the bytes of operands and result."""
        return itemsize * self.batch * (self.m * self.k + self.k * self.n + self.m * self.n)


def key_of(s: MatmulShape) -> ProductKey:
    """Return the key of a matmul that `shapes` lists."""
    layout = LAYOUTS.get(s.role, "g @ w") if s.batch == 1 else "batched"
    return ProductKey(layout, s.batch, s.m, s.n, s.k)


class Comparison(NamedTuple):
    """Two points of a study compared by measured matmuls.

    Args:
        measured: share of matmul time that the first saves.
        predicted: the same as predicted for this device; nan for an unknown one.
        compared: share of the FLOPs that both have measured.
    """

    measured: float
    predicted: float
    compared: float


@dataclass(frozen=True)
class Measured:
    """Seconds of matmuls on a device.

    Args:
        device: in words.
        hardware: its entry; None for an unknown GPU.
        dtype: of the operands.
        seconds: of one matmul, in the fastest round.
        left_out: those that were not measured, with the reason.
    """

    device: str
    hardware: Hardware | None
    dtype: torch.dtype
    seconds: dict[ProductKey, float]
    left_out: dict[ProductKey, str]

    def predicted(self, key: ProductKey) -> float | None:
        """Return the seconds that are predicted for this device."""
        if self.hardware is None:
            return None
        return tiling(self.hardware, *key[1:], self.dtype, key.bytes(self.dtype.itemsize)).seconds

    def compared(self, point: StudyPoint, base: StudyPoint) -> Comparison | None:
        """Compare the matmul time of a point with that of `base`; None if nothing can be compared.

        Of both, those modules and roles count of which all matmuls have been measured.
        """
        mine, theirs = self._by_module(point), self._by_module(base)
        both = mine.keys() & theirs.keys()
        if not both:
            return None
        measured = 1 - sum(mine[x][0] for x in both) / sum(theirs[x][0] for x in both)
        predicted = 1 - sum(mine[x][1] for x in both) / sum(theirs[x][1] for x in both) if self.hardware else float("nan")
        return Comparison(measured, predicted, sum(theirs[x][2] for x in both) / base.flops)

    def _by_module(self, point: StudyPoint) -> dict[tuple[str, str], tuple[float, float, int]]:
        """Return (measured seconds, predicted seconds, FLOPs) by (module, role)."""
        found: dict[tuple[str, str], tuple[float, float, int]] = {}
        missing = set()
        for s in point.products:
            key = key_of(s)
            for module, n in zip(s.modules, s.counts):
                where = (module, s.role)
                if key not in self.seconds:
                    missing.add(where)
                    continue
                measured, predicted, flops = found.get(where, (0.0, 0.0, 0))
                measured += n * self.seconds[key]
                found[where] = (measured, predicted + n * (self.predicted(key) or 0.0), flops + n * s.flops)
        return {where: sums for where, sums in found.items() if where not in missing}

    def jsonable(self) -> dict[str, Any]:
        """Return all of it as plain data: seconds and FLOP/s."""
        rows = [
            k._asdict() | {"seconds": t, "flop_s": k.flops / t, "predicted_seconds": self.predicted(k)}
            for k, t in self.seconds.items()
        ]
        left = [k._asdict() | {"why": why} for k, why in self.left_out.items()]
        return {"device": self.device, "dtype": str(self.dtype).removeprefix("torch."), "products": rows, "left_out": left}

    def text(self, found: Shapes) -> str:
        """Format what was measured beside what is predicted, the points of a study compared, and what was left out."""
        header = ("layout", "batch", "m", "n", "k", "GFLOP/s", "predicted")
        rows = [self._row(key) for key in self.seconds]
        lines = [
            f"Measured on {self.device}, {str(self.dtype).removeprefix('torch.')}, the fastest of several rounds; predicted for this device",
            table(header, rows, right=range(1, len(header))),
            *self._comparisons(found),
        ]
        if self.left_out:
            lines.append(f"Left out: {len(self.left_out)} of {len(self.left_out) + len(self.seconds)} matmuls:")
            lines += [
                f"  {k.layout}, {k.batch} x ({k.m:,}, {k.k:,}) x ({k.k:,}, {k.n:,}): {why}" for k, why in self.left_out.items()
            ]
        return "\n".join(lines)

    def _row(self, key: ProductKey) -> tuple[str, ...]:
        predicted = self.predicted(key)
        rates = (f"{key.flops / t / 1e9:,.4g}" if t else "-" for t in (self.seconds[key], predicted))
        return (key.layout, *(f"{x:,}" for x in key[1:]), *rates)

    def _comparisons(self, found: Shapes) -> Iterable[str]:
        base = found.tps[0]
        for point in found.cells:
            first = found.cell(point.local_batch, base)
            c = self.compared(point, first) if first is not None and point.tp != base else None
            if c is not None:
                here = "" if self.hardware is None else f", predicted for this device {c.predicted:+.1%}"
                yield (
                    f"tp={point.tp} at a local batch of {point.local_batch:g} saves {c.measured:+.1%} of matmul time against tp={base}{here} "
                    f"({c.compared:.0%} of the FLOPs)"
                )


def measure(
    found: Shapes,
    *,
    seconds: float = 60.0,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Measured:
    """Time all distinct matmuls of `found` on this machine.

    Args:
        found: by `shapes`.
        seconds: to spend, roughly.
        dtype: of the operands. Default: bfloat16 on a GPU, float32 on the CPU.
        device: "cuda" or "cpu". Default: a GPU if there is one.
        progress: called with what is measured next.

    Raises:
        TPError: for a time that is not above 0, or without a GPU for "cuda".
    """
    if not seconds > 0:
        raise TPError(f"`seconds={seconds!r}`: give a time above 0.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise TPError("`device='cuda'`: there is no GPU on this machine. Use 'cpu'.")
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    keys = list(dict.fromkeys(key_of(s) for c in found.cells for s in c.products if s.m))
    name, hw = present_device(device)
    best, left_out = _time(keys, seconds, dtype, device, progress or (lambda text: None))
    return Measured(name, hw, dtype, best, left_out)


def present_device(device: str) -> tuple[str, Hardware | None]:
    """Return the device's name and its entry; None for an unknown GPU."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        return name, guess(name)
    threads = torch.get_num_threads()
    one = hardware("cpu")
    return f"{threads} CPU thread{'s' if threads > 1 else ''}", replace(one, flops={k: v * threads for k, v in one.flops.items()})


def _time(
    keys: list[ProductKey], seconds: float, dtype: torch.dtype, device: str, tell: Callable[[str], None]
) -> tuple[dict[ProductKey, float], dict[ProductKey, str]]:
    """Return (seconds of each matmul in its fastest round, those that were left out with the reason)."""
    started = time.perf_counter()
    left_out = _too_large(keys, seconds, dtype, device)
    taken = [key for key in keys if key not in left_out]
    best: dict[ProductKey, float] = {}
    for done in range(ROUNDS):
        for i, key in enumerate(taken):
            if done and time.perf_counter() - started > seconds:  # each has run once
                return best, left_out
            tell(f"measuring, round {done + 1}, matmul {i + 1} of {len(taken)}")
            best[key] = min(best.get(key, float("inf")), once_of(key, dtype, device))
    return best, left_out


def _too_large(keys: list[ProductKey], seconds: float, dtype: torch.dtype, device: str) -> dict[ProductKey, str]:
    """Return the matmuls that do not fit into the time or the memory, from the largest on."""
    rate = rate_of(dtype, device)
    room = free_bytes(device) // 2
    left_out: dict[ProductKey, str] = {}
    planned = 0.0
    for key in sorted(keys, key=lambda k: k.flops):
        need, once = key.bytes(dtype.itemsize), key.flops / rate
        if need > room:
            left_out[key] = f"needs {size(need)}, {size(room)} are available"
        elif planned + 2 * FEWEST * once > seconds:  # each round runs it twice: the first initializes
            left_out[key] = f"about {once:.1f} s each, too long for {seconds:g} s in all"
        else:
            planned += 2 * FEWEST * once
    return left_out


def once_of(key: ProductKey, dtype: torch.dtype, device: str) -> float:
    """Return the seconds of one matmul; small ones run several times."""
    a, b = _operands(key, dtype, device)
    out = a @ b  # the first one initializes libraries
    times = max(1, min(50, int(2e7 // key.flops) if device == "cpu" else int(1e11 // key.flops)))
    if device == "cuda":
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        before.record()
        for _ in range(times):
            torch.matmul(a, b, out=out)
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after) / 1e3 / times
    start = time.perf_counter()
    for _ in range(times):
        torch.matmul(a, b, out=out)
    return (time.perf_counter() - start) / times


def _operands(key: ProductKey, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    def values(*shape: int) -> Tensor:
        if device == "cpu":
            return torch.full(shape, 0.5, dtype=dtype)  # random numbers would take longer to make than to multiply
        # equal numbers would need less power, and raise the clock
        return torch.empty(shape, dtype=dtype, device=device).uniform_(-1, 1)

    if key.layout == "batched":
        return values(key.batch, key.m, key.k), values(key.batch, key.k, key.n)
    if key.layout == "x @ w.T":
        return values(key.m, key.k), values(key.n, key.k).t()
    if key.layout == "x.T @ g":
        return values(key.k, key.m).t(), values(key.k, key.n)
    return values(key.m, key.k), values(key.k, key.n)


def rate_of(dtype: torch.dtype, device: str) -> float:
    """Return the FLOP/s of a matmul of medium size, to guess how long others take."""
    side = 512 if device == "cpu" else 4096
    key = ProductKey("g @ w", 1, side, side, side)
    once_of(key, dtype, device)  # threads, libraries, clocks
    return key.flops / once_of(key, dtype, device)


def free_bytes(device: str) -> int:
    """Return the bytes of memory that are not in use."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not on this system
        return 4 * 2**30
