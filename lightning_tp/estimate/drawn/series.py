"""The numbers behind the charts and tables of an estimate: its own, summed and put in order, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch

from lightning_tp.core.modules.blocks import fold
from lightning_tp.estimate.cost.memory import MemorySnapshot
from lightning_tp.estimate.cost.roofline import product_seconds
from lightning_tp.estimate.report.step import StepReport

# ColorBrewer's, as matplotlib's "tab20c" has them: four shades of a hue for what belongs together; they read on white and on black
BLUE, ORANGE, GREEN, PURPLE, GRAYS = (
    ("#3182bd", "#6baed6", "#9ecae1", "#c6dbef"),
    ("#e6550d", "#fd8d3c", "#fdae6b", "#fdd0a2"),
    ("#31a354", "#74c476", "#a1d99b", "#c7e9c0"),
    ("#756bb1", "#9e9ac8", "#bcbddc", "#dadaeb"),
    ("#636363", "#969696", "#bdbdbd", "#d9d9d9"),
)
PINK = "#d6619e"
KINDS = {  # of memory, in the order in which they are stacked: model state, FSDP2's buffers, activations
    **dict(zip(("parameters", "gradients", "optimizer", "buffers"), BLUE)),
    "optimizer's scratch": GRAYS[2],
    **dict(zip(("gathered parameters", "unsharded gradients", "FSDP2 buffers"), PURPLE)),
    **dict(zip(("attention", "MLP", "norms", "residual"), ORANGE)),
    **dict(zip(("embedding", "logits and loss"), GREEN)),
    "other": GRAYS[1],
    "backward": PINK,
}
AXES = {"tp": ORANGE[1], "dp": BLUE[0]}  # of the mesh
PHASES = {"forward": BLUE[0], "recompute": GREEN[0], "backward": PINK}


class Stretch(NamedTuple):
    """Consecutive memory snapshots that are alike, such as "forward of layers.{0-79}"."""

    name: str  # of them
    # first, last: their indices in the timeline, the last one included
    first: int
    last: int
    # begin, end, most: bytes at the first and the last, and the most of all
    begin: int
    end: int
    most: int


class BlockCollective(NamedTuple):
    """Collectives of one block (and of all that are alike), or of what lies outside of blocks."""

    where: str  # the blocks, or what it is for
    blocks: int  # how many
    # phase, kind, axis, ranks, bytes: as `Collective`
    phase: str
    kind: str
    axis: str
    ranks: int
    bytes: int
    each: int  # how many in a block and step

    @property
    def total(self) -> int:
        """Bytes in a step, of all blocks."""
        return self.bytes * self.each * self.blocks


class TimePart(NamedTuple):
    """A part of the time of a step: its color, the seconds that are exposed, and those it takes by itself."""

    name: str
    color: str
    exposed: float
    total: float


class RooflinePoint(NamedTuple):
    """A kind of matmul under the roofline: FLOPs per byte, FLOP/s, and the phase of the step."""

    intensity: float
    flops_per_s: float
    phase: str


def kinds_of(moments: Sequence[MemorySnapshot]) -> list[str]:
    """List the kinds of memory in use, in the order in which they are stacked.

    Example:
        >>> kinds_of([MemorySnapshot("forward", {"MLP": 3, "parameters": 1}), MemorySnapshot("step", {"a new kind": 1})])
        ['parameters', 'MLP', 'a new kind']
    """
    order = list(KINDS)
    used = {k for m in moments for k in m.kinds if m.kinds[k]}
    return sorted(used, key=lambda k: (order.index(k) if k in KINDS else len(order), k))


def color_of(kind: str) -> str:
    """Return the color of a kind of memory; all that have none of their own share one."""
    return KINDS.get(kind, GRAYS[0])


def memory_series(found: StepReport) -> dict[str, list[int]]:
    """Return the bytes of each kind at each moment of `found.memory.timeline`."""
    moments = found.memory.timeline
    return {kind: [m.kinds.get(kind, 0) for m in moments] for kind in kinds_of(moments)}


def stretches(found: StepReport) -> list[Stretch]:
    """Fold the timeline into a few lines: what repeats with another number, alone or two by turns, is one."""
    runs = [list(run) for _, run in groupby(enumerate(found.memory.timeline), key=lambda at: _starred(at[1].name))]
    names = [_starred(run[0][1].name) for run in runs]
    lines, i = [], 0
    while i < len(runs):
        turns = 1  # runs that take turns from here: the backward of a block, the sum of its gradients, the backward of the next
        while i + turns < len(runs) and names[i + turns] == names[i + turns % 2]:
            turns += 1
        turns = turns - turns % 2 if turns >= 4 else 1
        members = sorted(at for run in runs[i : i + turns] for at in run)
        folded = [fold([m.name for run in runs[n : i + turns : 2] for _, m in run]) for n in range(i, i + min(turns, 2))]
        totals = [m.total for _, m in members]
        lines.append(Stretch(" / ".join(folded), members[0][0], members[-1][0], totals[0], totals[-1], max(totals)))
        i += turns
    return lines


def time_parts(found: StepReport) -> list[TimePart]:
    """Split the time of a step into its parts; those that take none are left out."""
    t = found.time
    parts = [
        TimePart("matmuls (GEMMs)", BLUE[0], t.products, t.products),
        TimePart("attention", ORANGE[0], t.attention, t.attention),
        TimePart("other kernels (memory-bound)", ORANGE[2], t.other, t.other),
        TimePart("CPU launch overhead", GRAYS[1], t.host, t.host),
        TimePart("TP communication", GREEN[0], t.tp, t.tp),
        TimePart("FSDP2 communication", PURPLE[0], t.dp_exposed, t.dp),
        TimePart("kernels slowed by concurrent communication", PURPLE[2], t.slowed, t.slowed),
        TimePart("optimizer", BLUE[2], t.optimizer, t.optimizer),
    ]
    return [p for p in parts if p.exposed > 0 or p.total > 0]


def roofline_points(found: StepReport) -> list[RooflinePoint]:
    """Place each kind of matmul of a micro-batch, at the rate it is predicted to reach."""
    points = []
    for p in found.products:
        if p.kind == "product" and p.k and p.bytes:
            hw, flops = found.hardware, p.flops / p.count
            each = product_seconds(hw, p.batch, p.m, p.n, p.k, getattr(torch, p.dtype), p.bytes) / hw.sustained
            points.append(RooflinePoint(flops / p.bytes, flops / each, p.phase))
    return points


def block_collectives(found: StepReport) -> list[BlockCollective]:
    """List the collectives of a step by block; those that many blocks have in one line, and these first."""
    alike: dict[Any, list[str]] = {}
    for c in found.collectives:
        alike.setdefault((_starred(c.where), c.phase, c.kind, c.axis, c.ranks, c.bytes, c.count), []).append(c.where)
    in_order = sorted(alike.items(), key=lambda x: -len(x[1]))
    return [BlockCollective(fold(names) or "outside of blocks", len(names), *key) for (_, *key), names in in_order]


def _starred(text: str) -> str:
    """Replace the numbers of a text, which may be more than a name: "backward of layers.3"."""
    return re.sub(r"\d+", "*", text)
