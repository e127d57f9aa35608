"""Hold what `shapes` found about the matmuls of a model, and show it as tables, JSON and sentences."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from lightning_tp.core.tables import table
from lightning_tp.core.units import count, seconds, share, size
from lightning_tp.estimate.cost.hardware import Hardware
from lightning_tp.estimate.report.step import StepReport
from matmul_study.products import NOTHING, Lost, MatmulShape

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]  # title, header, rows


@dataclass(frozen=True)
class StudyPoint:
    """The matmuls of a step at one size of the tensor-parallel axis and one local batch.

    Args:
        tp, dp: the mesh.
        local_batch: samples per device.
        samples: per group of tp ranks, in a micro-batch.
        tokens: rows that a group has (samples times their length; samples, if inputs have no length).
        possible: whether there is a sample for each group; else the matmuls are those of sequences that are split evenly.
        why: it is not possible, or what is uneven.
        shapes: all matmuls of a step on the slowest rank, those with most seconds first; attention, too.
        estimate: of the whole step; None where it is not possible.
    """

    tp: int
    dp: int
    local_batch: float
    samples: float
    tokens: float
    possible: bool
    why: str
    shapes: tuple[MatmulShape, ...]
    estimate: StepReport | None

    @property
    def products(self) -> tuple[MatmulShape, ...]:
        """The matmuls without attention."""
        return tuple(s for s in self.shapes if s.kind == "product")

    @property
    def flops(self) -> int:
        """FLOPs of matmuls in a step on a rank."""
        return sum(s.flops * s.count for s in self.products)

    @property
    def seconds(self) -> float:
        """Seconds of matmuls in a step on a rank."""
        return sum(s.seconds * s.count for s in self.products)

    @property
    def flop_s(self) -> float:
        """FLOP/s of matmuls."""
        return self.flops / self.seconds

    @property
    def intensity(self) -> float:
        """FLOPs of matmuls for each byte that they move."""
        return self.flops / sum(s.bytes * s.count for s in self.products)

    @property
    def lost(self) -> Lost:
        """Where the seconds of matmuls go."""
        total = NOTHING
        for s in self.products:
            total = total.plus(s.lost, s.count)
        return total

    @property
    def gathered(self) -> int | None:
        """Bytes that FSDP2 all-gathers on a rank in a step."""
        return self._communicated("dp", ("all-gather",))

    @property
    def sent(self) -> int | None:
        """Bytes of the collectives on the tensor-parallel axis in a step."""
        return self._communicated("tp", ("all-reduce", "all-gather", "reduce-scatter"))

    def _communicated(self, axis: str, kinds: Sequence[str]) -> int | None:
        if self.estimate is None:
            return None
        return sum(c.bytes * c.count for c in self.estimate.collectives if c.axis == axis and c.kind in kinds)

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        names = ("tp", "dp", "local_batch", "samples", "tokens", "possible", "why")
        numbers = ("flops", "seconds", "flop_s", "intensity", "gathered", "sent")
        step, e = None, self.estimate
        if e is not None:
            step = {"seconds": e.time.step, "tokens_per_s_per_device": e.tokens_per_s_per_device, "mfu": e.mfu}
            step |= {"needed": e.needed, "fits": e.fits}
        rows = [
            asdict(s) | {"count": s.count, "intensity": s.intensity, "flop_s": s.flop_s, "lost": s.lost._asdict()}
            for s in self.shapes
        ]
        found = {name: getattr(self, name) for name in names + numbers}
        return found | {"lost": self.lost._asdict(), "step": step, "shapes": rows}


@dataclass(frozen=True)
class Shapes:
    """What `shapes` found; `str()` of it is the tables and the verdict.

    Args:
        model: its class.
        parameters: of it.
        gpus: devices.
        seq: tokens of a sample; None if inputs have none.
        hardware: that the times are for.
        cells: the points of the study, by local batch, then tp.
        left_out: sizes of the axis that were left out, and why.
    """

    model: str
    parameters: int
    gpus: int
    seq: int | None
    hardware: Hardware
    cells: tuple[StudyPoint, ...]
    left_out: Mapping[int, str]

    @property
    def local_batches(self) -> tuple[float, ...]:
        """Samples per device that were studied."""
        return tuple(dict.fromkeys(c.local_batch for c in self.cells))

    @property
    def tps(self) -> tuple[int, ...]:
        """Sizes of the tensor-parallel axis that were studied."""
        return tuple(sorted({c.tp for c in self.cells}))

    @property
    def headline(self) -> str:
        """Model, devices and samples in a line."""
        samples = f", samples of {self.seq:,} tokens" if self.seq is not None else ""
        return f"{self.model} ({count(self.parameters)} parameters) on {self.gpus:,} x {self.hardware.name}{samples}"

    def cell(self, local_batch: float, tp: int) -> StudyPoint | None:
        """Return a point; None if there is none."""
        return next((c for c in self.cells if c.local_batch == local_batch and c.tp == tp), None)

    def saved(self, cell: StudyPoint) -> float | None:
        """Return the share of matmul time that a point saves against the smallest tp at its local batch; below 0 if it takes longer."""
        base = self.cell(cell.local_batch, self.tps[0])
        return None if base is None else 1 - cell.seconds / base.seconds

    def verdict(self) -> list[str]:
        """Say in sentences which tp is faster where, and why."""
        return verdict(self)

    def to_json(self) -> str:
        """Return all of it as JSON: bytes, seconds, FLOPs."""
        head = {n: getattr(self, n) for n in ("model", "parameters", "gpus", "seq")}
        head |= {"hardware": self.hardware.key, "left_out": {str(k): v for k, v in self.left_out.items()}}
        cells = [c.as_dict() | {"saved": self.saved(c)} for c in self.cells]
        return json.dumps(head | {"verdict": self.verdict(), "cells": cells}, indent=1)

    def __str__(self) -> str:
        return text(self)


# --------------------------------------------------------------------------------------------------------------- the tables

WIDEST = 60  # characters of module names
WORDS = ("matmuls", "role", "")  # columns that are aligned to the left


def text(found: Shapes, *, details: bool | None = None) -> str:
    """Format all of it; `details`: each matmul, too (default: if there is one local batch only)."""
    lines = [found.headline]
    for title, header, rows in tables(found, details=len(found.local_batches) == 1 if details is None else details):
        right = [i for i, name in enumerate(header) if name not in WORDS]
        lines += ["", title, table(header, rows, right=right)]
    lines += ["", *verdict(found)]
    lines += [f"tp={tp} was left out: {why}" for tp, why in found.left_out.items()]
    return "\n".join(lines)


def tables(found: Shapes, *, details: bool) -> list[Table]:
    """Return (title, header, rows) of the summary, and with `details` of each point."""
    unit = "rows" if found.seq is not None else "samples"
    return [_summary(found, unit), *(_matmuls(c, unit) for c in found.cells if details)]


def _summary(found: Shapes, unit: str) -> Table:
    rate = "tokens/s" if found.seq is not None else "samples/s"
    lost = ("padding", "waves", "tiles", "memory", "launch")
    header = ("local batch", "tp", unit, "TFLOP/s", "time", "saved", "FLOP/B", *lost, rate, "fits", "")
    title = (
        "Matmuls (GEMMs) of a step on the slowest rank. padding, waves, tiles, memory, launch: shares of their time that are lost to tile padding, "
        f"idle multiprocessors in last waves, small tiles, memory bandwidth and kernel launch latency. {rate}: of the whole step per device, with "
        "communication"
    )
    return title, header, [_summary_row(found, c) for c in found.cells]


def _summary_row(found: Shapes, c: StudyPoint) -> tuple[str, ...]:
    saved, e = found.saved(c), c.estimate
    return (
        f"{c.local_batch:g}",
        str(c.tp),
        f"{c.tokens:,.0f}",
        f"{c.flop_s / 1e12:,.3g}",
        seconds(c.seconds),
        "" if saved is None or c.tp == found.tps[0] else f"{saved:+.1%}",
        f"{c.intensity:,.0f}",
        *(f"{x / c.seconds:.1%}" for x in c.lost),
        "-" if e is None else f"{e.tokens_per_s_per_device:,.0f}",
        "-" if e is None else "yes" if e.fits else "no",
        c.why if c.possible else f"as if sequences were split: {c.why}",
    )


def _matmuls(c: StudyPoint, unit: str) -> Table:
    header = ("matmuls", "role", "batch", "m", "n", "k", "count", "GFLOP", "FLOP/B", "tile", "padding", "idle", "TFLOP/s", "share")
    total = sum(s.seconds * s.count for s in c.shapes)
    split = "" if c.possible else ", as if sequences were split"
    title = f"tp={c.tp} x dp={c.dp} at a local batch of {c.local_batch:g} ({c.tokens:,.0f} {unit}{split})"
    return title, header, [_matmul_row(s, total) for s in c.shapes]


def _matmul_row(s: MatmulShape, total: float) -> tuple[str, ...]:
    tile = "" if not s.split else f"{s.tile[0]}x{s.tile[1]}" + (f" /{s.split}" if s.split > 1 else "")
    return (
        _module_names(s.modules),
        s.role if s.kind == "product" else f"{s.role}, attention",
        *(f"{x:,}" if x else "-" for x in (s.batch, s.m, s.n, s.k)),
        f"{s.count:,}",
        f"{s.flops / 1e9:,.3g}",
        f"{s.intensity:,.0f}",
        tile,
        f"{s.padding:.0%}" if s.split else "",
        f"{s.idle:.0%}" if s.split else "",
        f"{s.flop_s / 1e12:,.3g}",
        f"{s.seconds * s.count / total:.1%}",
    )


def _module_names(modules: Sequence[str]) -> str:
    """Join `layers.*.mlp.up_proj`, `layers.*.mlp.gate_proj` to "layers.*.mlp.up_proj, gate_proj"."""
    names = [m or "(the model)" for m in modules]
    stem = names[0].rpartition(".")[0]
    short = [names[0], *(n.removeprefix(stem + ".") if stem else n for n in names[1:])]
    joined = ", ".join(short)
    return joined if len(joined) <= WIDEST else f"{names[0]} and {len(names) - 1} more"


# -------------------------------------------------------------------------------------------------------------- the verdict

EVEN = 0.01  # of the time: less is no difference
REASONS = {  # of `Lost`, and "work": (what is better, what is worse)
    "padding": ("less tile padding", "more tile padding"),
    "waves": ("fuller last waves", "emptier last waves"),
    "tiles": ("larger tiles or fewer of them split", "smaller or split tiles"),
    "memory": ("fewer bytes for each FLOP", "more bytes for each FLOP"),
    "start": ("fewer matmuls", "more matmuls"),
    "work": ("fewer FLOPs", "FLOPs that are not split evenly"),
}


class _Against(NamedTuple):
    """A point beside that of the smallest tp at the same local batch."""

    point: StudyPoint
    base: StudyPoint

    @property
    def saved(self) -> float:
        return 1 - self.point.seconds / self.base.seconds


def verdict(found: Shapes) -> list[str]:
    """Return a sentence for each tp on matmuls, one for each local batch on the whole step, and what is not possible."""
    base, *others = found.tps
    lines = [_on_matmuls(found, tp, base) for tp in others]
    if not others:
        lines.append(f"Only tp={base} was studied; there is nothing to compare it with.")
    lines += [line for b in found.local_batches for line in _on_whole_step(found, b)]
    split = [c for c in found.cells if not c.possible]
    if split:
        where = "; ".join(
            f"tp={', '.join(str(c.tp) for c in split if c.local_batch == b)} at {b:g}"
            for b in dict.fromkeys(c.local_batch for c in split)
        )
        lines.append(f"Not possible without splitting sequences, and shown as if they were split evenly: {where}.")
    missing = [f"tp={tp} at {b:g}" for b in found.local_batches for tp in found.tps if found.cell(b, tp) is None]
    if missing:
        lines.append(f"Not possible, as there are fewer samples than groups of tp ranks: {', '.join(missing)}.")
    return lines


def _on_matmuls(found: Shapes, tp: int, base: int) -> str:
    pairs = [(found.cell(b, tp), found.cell(b, base)) for b in found.local_batches]
    compared = [_Against(point, first) for point, first in pairs if point is not None and first is not None]
    if not compared:
        return f"tp={tp}: no local batch can be compared with tp={base}."
    parts = []
    faster = [a for a in compared if a.saved > EVEN]
    slower = [a for a in compared if a.saved < -EVEN]
    even = [a for a in compared if abs(a.saved) <= EVEN]
    if faster:
        parts.append(f"gains {_spread(faster)} of matmul time {_at(faster)} ({_because(faster, 0)})")
    if even:
        parts.append(f"is even with it {_at(even)}")
    if slower:
        parts.append(f"loses {_spread(slower)} of matmul time {_at(slower)} ({_because(slower, 1)})")
    return f"tp={tp}, matmuls against tp={base}: {'; '.join(parts)}."


def _spread(compared: Sequence[_Against]) -> str:
    low, high = (share(pick(abs(a.saved) for a in compared), 1) for pick in (min, max))
    return low if low == high else f"{low} to {high}"


def _at(compared: Sequence[_Against]) -> str:
    *most, last = [f"{a.point.local_batch:g}" for a in compared]
    return "at a local batch of " + (f"{', '.join(most)} and {last}" if most else last)


def _because(compared: Sequence[_Against], worse: int) -> str:
    """Name the reasons that make up most of the difference; `worse`: 1 where the point is slower."""
    changes = {name: sum(getattr(a.base.lost, name) - getattr(a.point.lost, name) for a in compared) for name in Lost._fields}
    changes["work"] = sum((a.base.seconds - sum(a.base.lost)) - (a.point.seconds - sum(a.point.lost)) for a in compared)
    sign = -1 if worse else 1
    found = sorted(((sign * s, name) for name, s in changes.items() if sign * s > 0), reverse=True)
    total = sum(s for s, _ in found)
    return ", ".join(REASONS[name][worse] for s, name in found[:2] if s > 0.25 * total) or "several small reasons"


def _on_whole_step(found: Shapes, local_batch: float) -> list[str]:
    estimates = {c.tp: c.estimate for c in found.cells if c.local_batch == local_batch and c.estimate is not None}
    fits = {tp: e for tp, e in estimates.items() if e.fits}
    if not estimates:
        return []
    where = f"Whole step at a local batch of {local_batch:g}"
    if not fits:
        tp, least = min(estimates.items(), key=lambda item: item[1].needed)
        return [
            f"{where}: nothing fits in the memory of {found.hardware.name}; tp={tp} needs least, {size(least.needed)}. Try activation "
            "checkpointing."
        ]
    speed = {tp: e.tokens_per_s_per_device for tp, e in fits.items()}
    best = max(speed, key=lambda tp: speed[tp])
    rest = ", ".join(f"tp={tp} {speed[tp] / speed[best] - 1:+.0%}" for tp in speed if tp != best)
    over = [str(tp) for tp in estimates if tp not in fits]
    unit = "tokens" if found.seq is not None else "samples"
    line = f"{where}, with communication: tp={best} is fastest, {speed[best]:,.0f} {unit}/s per device"
    line += f" ({rest})" if rest else ""
    line += f"; tp={', '.join(over)} is out of memory" if over else ""
    return [line + "."]
