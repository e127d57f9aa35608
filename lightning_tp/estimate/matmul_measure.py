"""Time the matrix products that `shapes` lists on the device that is there.

Each distinct product runs in its true size and in the layout of its role (forward: a weight read transposed; gradient of a weight: an input read
transposed), in rounds over all of them, so that what else runs on the machine meets all alike; the fastest round counts. Products that would
take too long or need too much memory are left out, and named.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_tp.errors import TPError
from lightning_tp.estimate.cost.gemm_tiling import tiling
from lightning_tp.estimate.cost.hardware import Hardware, guess, hardware
from lightning_tp.estimate.cost.products import MatmulShape
from lightning_tp.estimate.report.matmul import Shapes, StudyPoint
from lightning_tp.plan.table import columns

ROUNDS = 5  # at most
FEWEST = 3  # rounds that have to fit into the time


class ProductKey(NamedTuple):
    """What makes products different to a device: sizes and layout."""

    layout: str
    batch: int
    m: int
    n: int
    k: int

    @property
    def flops(self) -> int:
        """Multiply-adds count two."""
        return 2 * self.batch * self.m * self.n * self.k

    def bytes(self, itemsize: int) -> int:
        """Of operands and result."""
        return itemsize * self.batch * (self.m * self.k + self.k * self.n + self.m * self.n)


def key_of(s: MatmulShape) -> ProductKey:
    """Of one that `shapes` lists."""
    layouts = {"forward": "x @ w.T", "recompute": "x @ w.T", "grad of weight": "x.T @ g"}
    return ProductKey(layouts.get(s.role, "g @ w") if s.batch == 1 else "batched", s.batch, s.m, s.n, s.k)


@dataclass(frozen=True)
class Measured:
    """Seconds of products.

    Args:
        device: on which, in words.
        hardware: its entry; None for an unknown GPU.
        dtype: of the operands.
        seconds: of one product, the fastest.
        left_out: those that were not measured, with the reason.
    """

    device: str
    hardware: Hardware | None
    dtype: torch.dtype
    seconds: dict[ProductKey, float]
    left_out: dict[ProductKey, str]

    def predicted(self, key: ProductKey) -> float | None:
        """Seconds that the model of this device says."""
        if self.hardware is None:
            return None
        return tiling(self.hardware, *key[1:], self.dtype, key.bytes(self.dtype.itemsize)).seconds

    def compared(self, cell: StudyPoint, base: StudyPoint) -> tuple[float, float, float] | None:
        """Shares of matrix time that the cell saves against `base`: (measured, predicted for this device, share of FLOPs compared).

        Of both, those modules and roles count of which all products have been measured. None if there is none.
        """
        mine, theirs = self._by_module(cell), self._by_module(base)
        both = mine.keys() & theirs.keys()
        if not both:
            return None
        measured = 1 - sum(mine[x][0] for x in both) / sum(theirs[x][0] for x in both)
        predicted = 1 - sum(mine[x][1] for x in both) / sum(theirs[x][1] for x in both) if self.hardware else float("nan")
        return measured, predicted, sum(theirs[x][2] for x in both) / base.flops

    def _by_module(self, cell: StudyPoint) -> dict[tuple[str, str], tuple[float, float, int]]:
        found: dict[tuple[str, str], tuple[float, float, int]] = {}
        missing = set()
        for s in cell.products:
            key = key_of(s)
            for module, n in zip(s.modules, s.counts):
                where = (module, s.role)
                if key not in self.seconds:
                    missing.add(where)
                    continue
                a, b, c = found.get(where, (0.0, 0.0, 0))
                found[where] = (a + n * self.seconds[key], b + n * (self.predicted(key) or 0.0), c + n * s.flops)
        return {where: v for where, v in found.items() if where not in missing}

    def jsonable(self) -> dict[str, Any]:
        """All of it, as JSON has it; seconds and FLOP/s."""
        rows = [
            k._asdict() | {"seconds": t, "flop_s": k.flops / t, "predicted_seconds": self.predicted(k)}
            for k, t in self.seconds.items()
        ]
        left = [k._asdict() | {"why": why} for k, why in self.left_out.items()]
        return {"device": self.device, "dtype": str(self.dtype).removeprefix("torch."), "products": rows, "left_out": left}

    def text(self, found: Shapes) -> str:
        """What was measured beside what is predicted, and what was left out."""
        lines = [
            f"Measured on {self.device}, {str(self.dtype).removeprefix('torch.')}: GFLOP/s (predicted for it), the fastest of several rounds"
        ]
        rows: list[tuple[str, ...]] = [("layout", "batch", "m", "n", "k", "GFLOP/s", "predicted")]
        for key, t in self.seconds.items():
            expected = self.predicted(key)
            rows.append(
                (
                    key.layout,
                    *(f"{x:,}" for x in key[1:]),
                    f"{key.flops / t / 1e9:,.4g}",
                    f"{key.flops / expected / 1e9:,.4g}" if expected else "-",
                )
            )
        lines += columns(rows, left={0})
        base = found.tps[0]
        for c in found.cells:
            first = found.cell(c.local_batch, base)
            compared = self.compared(c, first) if first is not None and c.tp != base else None
            if compared is not None:
                here = "" if self.hardware is None else f", predicted for this device {compared[1]:+.1%}"
                lines.append(
                    f"tp={c.tp} at a local batch of {c.local_batch:g} saves {compared[0]:+.1%} of matrix time against tp={base}{here} "
                    f"({compared[2]:.0%} of the FLOPs)"
                )
        if self.left_out:
            lines.append(f"Left out: {len(self.left_out)} of {len(self.left_out) + len(self.seconds)} products:")
            lines += [
                f"  {k.layout}, {k.batch} x ({k.m:,}, {k.k:,}) x ({k.k:,}, {k.n:,}): {why}" for k, why in self.left_out.items()
            ]
        return "\n".join(lines)


def measure(
    found: Shapes,
    *,
    seconds: float = 60.0,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Measured:
    """Time all distinct products of `found` on this machine.

    Args:
        found: what `shapes` gave.
        seconds: to spend, about.
        dtype: of the operands. Default: bfloat16 on a GPU, float32 on the CPU.
        device: "cuda" or "cpu". Default: a GPU if there is one.
        progress: is told how far it is.

    Raises:
        TPError: for a time that is not above 0, or a device that is not there.
    """
    if not seconds > 0:
        raise TPError(f"`seconds={seconds!r}`: give a time above 0.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise TPError("`device='cuda'`: there is no GPU on this machine. Use 'cpu'.")
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    keys = list(dict.fromkeys(key_of(s) for c in found.cells for s in c.products if s.m))
    name, hw = present_device(device)
    return _time(keys, seconds, dtype, device, name, hw, progress or (lambda text: None))


def present_device(device: str) -> tuple[str, Hardware | None]:
    """Its name, and its entry; None for an unknown GPU."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        return name, guess(name)
    threads = torch.get_num_threads()
    one = hardware("cpu")
    return f"{threads} CPU thread{'s' if threads > 1 else ''}", replace(one, flops={k: v * threads for k, v in one.flops.items()})


def _time(
    keys: list[ProductKey],
    seconds: float,
    dtype: torch.dtype,
    device: str,
    name: str,
    hw: Hardware | None,
    tell: Callable[[str], None],
) -> Measured:
    started = time.perf_counter()
    rate = rate_of(dtype, device)
    room = free_bytes(device) // 2
    taken: list[ProductKey] = []
    left_out: dict[ProductKey, str] = {}
    planned = 0.0
    for key in sorted(keys, key=lambda k: k.flops):
        need, once = key.bytes(dtype.itemsize), key.flops / rate
        if need > room:
            left_out[key] = f"needs {need / 2**30:.1f} GiB, {room / 2**30:.1f} are to spare"
        elif planned + 2 * FEWEST * once > seconds:  # each round runs it twice, once for what is set up
            left_out[key] = f"about {once:.1f} s each, too long for {seconds:g} s in all"
        else:
            taken.append(key)
            planned += 2 * FEWEST * once
    best: dict[ProductKey, float] = {}
    taken = [k for k in keys if k in set(taken)]
    for done in range(ROUNDS):
        for i, key in enumerate(taken):
            if done and time.perf_counter() - started > seconds:  # each has run once
                return Measured(name, hw, dtype, best, left_out)
            tell(f"measuring, round {done + 1}, product {i + 1} of {len(taken)}")
            best[key] = min(best.get(key, float("inf")), once_of(key, dtype, device))
    return Measured(name, hw, dtype, best, left_out)


def once_of(key: ProductKey, dtype: torch.dtype, device: str) -> float:
    """Seconds of one product; small ones run several times."""
    a, b = _operands(key, dtype, device)
    out = a @ b  # the first pays for what is set up once
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
        return torch.empty(shape, dtype=dtype, device=device).uniform_(
            -1, 1
        )  # equal ones would need less power, and raise the clock

    if key.layout == "batched":
        return values(key.batch, key.m, key.k), values(key.batch, key.k, key.n)
    if key.layout == "x @ w.T":
        return values(key.m, key.k), values(key.n, key.k).t()
    if key.layout == "x.T @ g":
        return values(key.k, key.m).t(), values(key.k, key.n)
    return values(key.m, key.k), values(key.k, key.n)


def rate_of(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a product of medium size, for a guess at how long others take."""
    side = 512 if device == "cpu" else 4096
    key = ProductKey("g @ w", 1, side, side, side)
    once_of(key, dtype, device)  # threads, libraries, clocks
    return key.flops / once_of(key, dtype, device)


def free_bytes(device: str) -> int:
    """Memory that is not in use."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not on this system
        return 4 * 2**30
