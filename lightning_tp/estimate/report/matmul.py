"""What `shapes` found, as tables and in sentences."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lightning_tp.core.units import count, seconds, size
from lightning_tp.estimate.cost.hardware import Hardware
from lightning_tp.estimate.cost.products import NOTHING, Lost, MatmulShape
from lightning_tp.estimate.report.step import StepReport, Table
from lightning_tp.plan.table import columns

if TYPE_CHECKING:
    from lightning_tp.estimate.cost.products import MatmulShape


@dataclass(frozen=True)
class StudyPoint:
    """One size of the tensor-parallel axis at one local batch.

    Args:
        tp, dp: the mesh.
        local_batch: samples for each device.
        samples: for each group of tp ranks, in a micro-batch.
        tokens: rows that a group has (samples times their length; samples, where inputs have no length).
        possible: whether there is a sample for each group; else its products are those of sequences that are split evenly.
        why: it is not possible, or what is uneven.
        shapes: all products of a step on the slowest rank, the longest first; attention, too.
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
        """Without attention."""
        return tuple(s for s in self.shapes if s.kind == "product")

    @property
    def flops(self) -> int:
        """Of matrix products in a step on a rank."""
        return sum(s.flops * s.count for s in self.products)

    @property
    def seconds(self) -> float:
        """Of matrix products in a step on a rank."""
        return sum(s.seconds * s.count for s in self.products)

    @property
    def flop_s(self) -> float:
        """FLOP/s of matrix products."""
        return self.flops / self.seconds

    @property
    def intensity(self) -> float:
        """FLOPs of matrix products for each byte that they move."""
        return self.flops / sum(s.bytes * s.count for s in self.products)

    @property
    def lost(self) -> Lost:
        """Where the seconds of matrix products go."""
        total = NOTHING
        for s in self.products:
            total = total.plus(s.lost, s.count)
        return total

    @property
    def gathered(self) -> int | None:
        """Bytes that FSDP2 gathers on a rank in a step."""
        return self._sent("dp")

    @property
    def sent(self) -> int | None:
        """Bytes of the collectives on the tensor-parallel axis in a step."""
        return self._sent("tp")

    def _sent(self, axis: str) -> int | None:
        if self.estimate is None:
            return None
        found = (c for c in self.estimate.collectives if c.axis == axis and (axis == "tp" or c.kind == "all-gather"))
        return sum(c.bytes * c.count for c in found)


@dataclass(frozen=True)
class Shapes:
    """What `shapes` found; `str()` of it is the tables and the verdict.

    Args:
        model: its class.
        parameters: of it.
        gpus: devices.
        seq: tokens of a sample; None where inputs have none.
        hardware: what the times are for.
        cells: by local batch, then tp.
        left_out: sizes of the axis that were not looked at, and why.
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
        """Samples for each device that were looked at."""
        return tuple(dict.fromkeys(c.local_batch for c in self.cells))

    @property
    def tps(self) -> tuple[int, ...]:
        """Sizes of the tensor-parallel axis that were looked at."""
        return tuple(sorted({c.tp for c in self.cells}))

    def cell(self, local_batch: float, tp: int) -> StudyPoint | None:
        """That one; None if it could not be traced."""
        return next((c for c in self.cells if c.local_batch == local_batch and c.tp == tp), None)

    def saved(self, cell: StudyPoint) -> float | None:
        """Share of the matrix time of the smallest tp at this local batch that this one saves; below 0 where it takes longer."""
        base = self.cell(cell.local_batch, self.tps[0])
        return None if base is None else 1 - cell.seconds / base.seconds

    def verdict(self) -> list[str]:
        """Which tp gains where, and why, in sentences."""

        return verdict(self)

    def to_json(self) -> str:
        """All of it; bytes, seconds, FLOPs."""
        cells = []
        for c in self.cells:
            numbers = {n: getattr(c, n) for n in ("tp", "dp", "local_batch", "samples", "tokens", "possible", "why")}
            numbers |= {n: getattr(c, n) for n in ("flops", "seconds", "flop_s", "intensity", "gathered", "sent")}
            e = c.estimate
            step = None if e is None else {"seconds": e.time.step, "tokens_per_s_per_device": e.tokens_per_s_per_device}
            if e is not None and step is not None:
                step |= {"mfu": e.mfu, "needed": e.needed, "fits": e.fits}
            rows = [
                asdict(s) | {"count": s.count, "intensity": s.intensity, "flop_s": s.flop_s, "lost": s.lost._asdict()}
                for s in c.shapes
            ]
            cells.append(numbers | {"saved": self.saved(c), "lost": c.lost._asdict(), "step": step, "shapes": rows})
        head = {n: getattr(self, n) for n in ("model", "parameters", "gpus", "seq")}
        head |= {"hardware": self.hardware.key, "left_out": {str(k): v for k, v in self.left_out.items()}}
        return json.dumps(head | {"verdict": self.verdict(), "cells": cells}, indent=1)

    def __str__(self) -> str:

        return text(self)


EVEN = 0.01  # of the time: less is no difference


TEXT = ("products", "of", "")  # columns of words


WIDEST = 60  # characters of module names


WHY_LESS = {
    "padding": "less padding in tiles",
    "waves": "fuller last waves",
    "tiles": "larger tiles or fewer of them split",
    "memory": "fewer bytes for each FLOP",
    "start": "fewer products",
}


WHY_MORE = {
    "padding": "more padding in tiles",
    "waves": "emptier last waves",
    "tiles": "smaller or split tiles",
    "memory": "more bytes for each FLOP",
    "start": "more products",
}


def text(found: Shapes, *, details: bool | None = None) -> str:
    """All of it; `details`: each product, too (default: if there is one local batch only)."""
    lines = [headline(found)]
    for title, names, rows in tables(found, details=len(found.local_batches) == 1 if details is None else details):
        lines += ["", title, *columns([names, *rows], left={i for i, n in enumerate(names) if n in TEXT})]
    lines += ["", *verdict(found)]
    lines += [f"tp={tp} was left out: {why}" for tp, why in found.left_out.items()]
    return "\n".join(lines)


def headline(found: Shapes) -> str:
    """Of what, in a line."""
    of = f", samples of {found.seq:,} tokens" if found.seq is not None else ""
    return f"{found.model} ({count(found.parameters)} parameters) on {found.gpus:,} x {found.hardware.name}{of}"


def tables(found: Shapes, *, details: bool) -> list[Table]:
    """(title, column names, rows)."""
    made = [_summary(found)]
    if details:
        made += [_products(c, "rows" if found.seq is not None else "samples") for c in found.cells]
    return made


def _summary(found: Shapes) -> Table:
    names = (
        "local batch",
        "tp",
        "rows" if found.seq is not None else "samples",
        "TFLOP/s",
        "time",
        "saved",
        "FLOP/B",
        "padding",
        "waves",
        "tiles",
        "memory",
        "start",
        "tokens/s" if found.seq is not None else "samples/s",
        "fits",
        "",
    )
    rows = []
    for c in found.cells:
        lost = [f"{x / c.seconds:.1%}" for x in c.lost]
        saved = found.saved(c)
        e = c.estimate
        rows.append(
            (
                f"{c.local_batch:g}",
                str(c.tp),
                f"{c.tokens:,.0f}",
                f"{c.flop_s / 1e12:,.3g}",
                seconds(c.seconds),
                "" if saved is None or c.tp == found.tps[0] else f"{saved:+.1%}",
                f"{c.intensity:,.0f}",
                *lost,
                f"{e.tokens_per_s_per_device:,.0f}" if e is not None else "-",
                "-" if e is None else "yes" if e.fits else "no",
                c.why if c.possible else f"as if sequences were split: {c.why}",
            )
        )
    title = (
        "Matrix products of a step on the slowest rank; shares of their time that are lost to padding in tiles, idle units in last waves, "
        "small tiles, memory and starts; the rate of the whole step on a device, with communication"
    )
    return title, names, rows


def _products(c: StudyPoint, unit: str) -> Table:
    names = ("products", "of", "batch", "m", "n", "k", "count", "GFLOP", "FLOP/B", "tile", "padding", "idle", "TFLOP/s", "share")
    total = sum(s.seconds * s.count for s in c.shapes)
    rows = [_row(s, total) for s in c.shapes]
    split = "" if c.possible else ", as if sequences were split"
    return f"tp={c.tp} x dp={c.dp} at a local batch of {c.local_batch:g} ({c.tokens:,.0f} {unit}{split})", names, rows


def _row(s: MatmulShape, total: float) -> tuple[str, ...]:
    tile = "" if not s.split else f"{s.tile[0]}x{s.tile[1]}" + (f" /{s.split}" if s.split > 1 else "")
    return (
        _named(s.modules),
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


def _named(modules: Sequence[str]) -> str:
    """`layers.*.mlp.up_proj`, `layers.*.mlp.gate_proj` -> "layers.*.mlp.up_proj, gate_proj"."""
    names = [m or "(the model)" for m in modules]
    stem = names[0].rpartition(".")[0]
    short = [names[0], *(n.removeprefix(stem + ".") if stem else n for n in names[1:])]
    joined = ", ".join(short)
    return joined if len(joined) <= WIDEST else f"{names[0]} and {len(names) - 1} more"


def verdict(found: Shapes) -> list[str]:
    """A sentence for each tp on matrix products, one for each local batch on the whole step, and what is not possible."""
    base, *others = found.tps
    lines = [_of_tp(found, tp, base) for tp in others]
    if not others:
        lines.append(f"Only tp={base} was looked at; there is nothing to compare it with.")
    lines += _whole_step(found)
    split = [c for c in found.cells if not c.possible]
    if split:
        where = "; ".join(
            f"tp={', '.join(str(c.tp) for c in split if c.local_batch == b)} at {b:g}"
            for b in dict.fromkeys(c.local_batch for c in split)
        )
        lines.append(f"Not possible without splitting sequences, and shown as if they were split evenly: {where}.")
    none = [f"tp={tp} at {b:g}" for b in found.local_batches for tp in found.tps if found.cell(b, tp) is None]
    if none:
        lines.append(f"Not possible, as there are fewer samples than groups of tp ranks: {', '.join(none)}.")
    return lines


def _of_tp(found: Shapes, tp: int, base: int) -> str:
    groups: dict[str, list[tuple[StudyPoint, StudyPoint, float]]] = {"gains": [], "is even": [], "loses": []}
    for b in found.local_batches:
        cell, first = found.cell(b, tp), found.cell(b, base)
        if cell is None or first is None:
            continue
        saved = 1 - cell.seconds / first.seconds
        groups["gains" if saved > EVEN else "loses" if saved < -EVEN else "is even"].append((cell, first, saved))
    parts = []
    for word, cells in groups.items():
        if not cells:
            continue
        where = f"at a local batch of {_numbers([c.local_batch for c, _, _ in cells])}"
        if word == "is even":
            parts.append(f"is even with it {where}")
            continue
        low, high = sorted((min(abs(s) for *_, s in cells), max(abs(s) for *_, s in cells)))
        share = f"{low:.0%}" if f"{low:.0%}" == f"{high:.0%}" else f"{low:.0%} to {high:.0%}"
        parts.append(f"{word} {share} of matrix time {where} ({_because(cells, word == 'gains')})")
    if not parts:
        return f"tp={tp}: no local batch can be compared with tp={base}."
    return f"tp={tp}, matrix products against tp={base}: {'; '.join(parts)}."


def _because(cells: list[tuple[StudyPoint, StudyPoint, float]], gain: bool) -> str:
    """The reasons that make up most of it."""
    less = {name: sum(getattr(f.lost, name) - getattr(c.lost, name) for c, f, _ in cells) for name in WHY_LESS}
    less["work"] = sum((f.seconds - sum(f.lost)) - (c.seconds - sum(c.lost)) for c, f, _ in cells)
    sign = 1 if gain else -1
    mine = sorted(((sign * v, n) for n, v in less.items() if sign * v > 0), reverse=True)
    whole = sum(v for v, _ in mine)
    words = (WHY_LESS if gain else WHY_MORE) | {"work": "fewer FLOPs" if gain else "FLOPs that are not split evenly"}
    return ", ".join(words[n] for v, n in mine[:2] if v > 0.25 * whole) or "several small reasons"


def _whole_step(found: Shapes) -> list[str]:
    lines = []
    for b in found.local_batches:
        done = [c for c in found.cells if c.local_batch == b and c.estimate is not None]
        fits = [c for c in done if c.estimate is not None and c.estimate.fits]
        if not done:
            continue
        over = [c.tp for c in done if c not in fits]
        fails = f"; tp={', '.join(map(str, over))} does not fit in memory" if over else ""
        if not fits:
            needs = min((c.estimate for c in done if c.estimate), key=lambda e: e.needed)
            lines.append(
                f"Whole step at a local batch of {b:g}: nothing fits in the memory of {found.hardware.name} (the least, tp={needs.tp}, needs "
                f"{size(needs.needed)}). See activation checkpointing."
            )
            continue
        speed = {c.tp: c.estimate.tokens_per_s_per_device for c in fits if c.estimate}
        best = max(speed, key=lambda tp: speed[tp])
        rest = ", ".join(f"tp={tp} {speed[tp] / speed[best] - 1:+.0%}" for tp in speed if tp != best)
        unit = "tokens" if found.seq is not None else "samples"
        lines.append(
            f"Whole step at a local batch of {b:g}, with communication: tp={best} is fastest, {speed[best]:,.0f} {unit}/s on a device"
            + (f" ({rest})" if rest else "")
            + f"{fails}."
        )
    return lines


def _numbers(values: list[float]) -> str:
    words = [f"{v:g}" for v in values]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
