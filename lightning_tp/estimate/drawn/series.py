"""The numbers behind the plots and the tables of a report: what is drawn is an estimate's own numbers, summed and put in order, and nothing else."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from lightning_tp.core.modules.blocks import fold
from lightning_tp.estimate.cost.memory import MemorySnapshot
from lightning_tp.estimate.cost.roofline import product_seconds
from lightning_tp.estimate.drawn.drawing import COLORS
from lightning_tp.estimate.report.step import StepReport

ORDER = tuple(COLORS)  # of kinds: what lasts first


@dataclass(frozen=True)
class Stretch:
    """Moments behind each other that are alike: "forward of layers.{0-79}".

    Args:
        name: of them.
        first, last: their places in the timeline, the last one included.
        begin, end, most: bytes at the first and the last, and the most of all.
    """

    name: str
    first: int
    last: int
    begin: int
    end: int
    most: int


@dataclass(frozen=True)
class BlockCollective:
    """Collectives of one block (and of all that are alike), or of what lies outside of blocks.

    Args:
        where: the blocks, or what it is for.
        blocks: how many.
        phase, kind, axis, ranks, bytes: as `Collective`.
        each: how many in a block and step.
    """

    where: str
    blocks: int
    phase: str
    kind: str
    axis: str
    ranks: int
    bytes: int
    each: int

    @property
    def total(self) -> int:
        """Bytes in a step, of all blocks."""
        return self.bytes * self.each * self.blocks


def kinds_of(moments: Sequence[MemorySnapshot]) -> list[str]:
    """The kinds of memory that there are, in the order in which they are stacked."""
    found = {k for m in moments for k in m.kinds}
    return sorted(found, key=lambda k: (ORDER.index(k) if k in ORDER else len(ORDER), k))


def memory_series(found: StepReport) -> dict[str, list[int]]:
    """Bytes of each kind at each moment of `found.memory.timeline`."""
    moments = found.memory.timeline
    return {kind: [m.kinds.get(kind, 0) for m in moments] for kind in kinds_of(moments)}


def stretches(found: StepReport) -> list[Stretch]:
    """The timeline in a few lines."""
    at, lines = 0, []
    for _, group in groupby(found.memory.timeline, key=lambda m: _starred(m.name)):
        of = list(group)
        totals = [m.total for m in of]
        lines.append(Stretch(_folded([m.name for m in of]), at, at + len(of) - 1, totals[0], totals[-1], max(totals)))
        at += len(of)
    return _together(lines)


def _together(lines: list[Stretch]) -> list[Stretch]:
    """Two names that take turns (the backward of a block, the sum of its gradients) as one stretch."""
    found: list[Stretch] = []
    i = 0
    while i < len(lines):
        pair = (_starred(lines[i].name), _starred(lines[i + 1].name)) if i + 1 < len(lines) else ("", "")
        j = i
        while j + 1 < len(lines) and pair[0] != pair[1] and (_starred(lines[j].name), _starred(lines[j + 1].name)) == pair:
            j += 2
        if j - i >= 4:
            run = lines[i:j]
            name = " / ".join(_folded([s.name for s in run[n::2]]) for n in (0, 1))
            found.append(Stretch(name, run[0].first, run[-1].last, run[0].begin, run[-1].end, max(s.most for s in run)))
            i = j
        else:
            found.append(lines[i])
            i += 1
    return found


def time_parts(found: StepReport) -> list[tuple[str, str, float, float]]:
    """(part, color, seconds with overlap, seconds one after the other) of a step."""
    t = found.time
    parts = [
        ("matrix products", "parameters", t.products, t.products),
        ("attention", "attention", t.attention, t.attention),
        ("other kernels (memory)", "norms", t.other, t.other),
        ("waiting for the host", "other", t.host, t.host),
        ("collectives, tensor-parallel axis", "tp", t.tp, t.tp),
        ("collectives, data-parallel axis", "gathered parameters", t.dp_exposed, t.dp),
        ("kernels slowed by collectives beside them", "buffers", t.slowed, t.slowed),
        ("optimizer", "optimizer", t.optimizer, t.optimizer),
    ]
    return [p for p in parts if p[2] > 0 or p[3] > 0]


@dataclass(frozen=True)
class Point:
    """A kind of matrix product under the roofline."""

    intensity: float
    flops_per_s: float
    phase: str
    words: str


def roofline_points(found: StepReport) -> list[Point]:
    """The matrix products of a micro-batch, as fast as they are taken to be."""
    points = []
    for p in found.products:
        if p.kind != "product" or not p.k or not p.bytes:
            continue
        dtype = getattr(torch, p.dtype)
        each = product_seconds(found.hardware, p.batch, p.m, p.n, p.k, dtype, p.bytes) / found.hardware.sustained
        flops = p.flops / p.count
        words = f"{p.module} ({p.phase}): {p.m:,} x {p.k:,} times {p.k:,} x {p.n:,}, {flops / each / 1e12:.3g} TFLOP/s"
        points.append(Point(flops / p.bytes, flops / each, p.phase, words))
    return points


def block_collectives(found: StepReport) -> list[BlockCollective]:
    """The collectives of a step by block; those that many blocks have in one line, and these first."""
    each: Counter[tuple[str, str, str, str, int, int]] = Counter()
    for c in found.collectives:
        each[c.where, c.phase, c.kind, c.axis, c.ranks, c.bytes] += c.count
    alike: dict[tuple[str, str, str, str, int, int, int], list[str]] = {}
    for (where, *key), n in each.items():
        alike.setdefault((_starred(where), *key, n), []).append(where)  # type: ignore[arg-type]
    return [
        BlockCollective(_folded(names) or "outside of blocks", len(names), *key)  # type: ignore[arg-type]
        for (_, *key), names in sorted(alike.items(), key=lambda x: -len(x[1]))
    ]


def _starred(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _folded(names: list[str]) -> str:
    return fold(list(dict.fromkeys(names)))
