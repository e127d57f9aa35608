"""Hold what was predicted for one rank of a mesh, and show it as tables and JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_tp.core.tables import table
from lightning_tp.core.units import count, seconds, share, size
from lightning_tp.estimate.cost.collectives import Collective
from lightning_tp.estimate.cost.flops import Flops, Product
from lightning_tp.estimate.cost.hardware import Hardware
from lightning_tp.estimate.cost.memory import Memory
from lightning_tp.estimate.cost.step_time import Time

if TYPE_CHECKING:
    from lightning_tp.estimate.rank.rank_model import RankModel
    from lightning_tp.plan.checked import CheckedPlan


class Table(NamedTuple):
    """A table of a report; the columns `right` are numbers."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Sequence[int] = ()


@dataclass(frozen=True)
class StepReport:
    """A training step on one rank of `dp` x `tp`: the base of `lightning_tp.Estimate`; `str()` of it is a table.

    Args:
        model: its class.
        parameters: of the full model, and `held` of them on a rank.
        dp, tp: the mesh.
        batch: samples of a micro-batch on a data-parallel rank.
        tokens: of all ranks in one optimizer step (samples, if the inputs have no tokens).
        accumulate: micro-batches of a step.
        precision, optimizer, activation_checkpointing: as asked for.
        hardware: that the times are for.
        memory: bytes on a rank.
        collectives: of an optimizer step.
        products: the matmuls of a micro-batch on a rank.
        flops: of a micro-batch.
        time: seconds of a step.
        plan: how the model is sharded, in a line.
        assumptions: all that the numbers rest on.
        peak_flops: FLOP/s of a device, in the dtype of the matmuls.
        unit: "tokens", or "samples" if the inputs have no tokens: what `tokens` and the rates count.
        traced: the plan, the model on a rank, and in one process, for pictures; not in the JSON.
    """

    model: str
    parameters: int
    held: int
    dp: int
    tp: int
    batch: int
    tokens: int
    accumulate: int
    precision: str
    optimizer: str
    activation_checkpointing: str
    hardware: Hardware
    memory: Memory
    collectives: tuple[Collective, ...]
    products: tuple[Product, ...]
    flops: Flops
    time: Time
    plan: str
    assumptions: tuple[str, ...]
    peak_flops: float
    unit: str = "tokens"
    traced: tuple[CheckedPlan, RankModel, RankModel] | None = field(default=None, compare=False, repr=False)

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all devices."""
        return self.tokens / self.time.step

    @property
    def tokens_per_s_per_device(self) -> float:
        """Tokens per second of one device."""
        return self.tokens_per_s / (self.dp * self.tp)

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: model FLOP/s as a share of the peak of all devices, from 0 to 1."""
        done = self.flops.model * self.dp * self.accumulate
        return done / (self.time.step * self.dp * self.tp * self.peak_flops)

    @property
    def needed(self) -> float:
        """Bytes that a device needs: the peak, allocator overhead, and what is taken before the first tensor."""
        return self.memory.peak.total * (1 + self.hardware.fragmentation) + self.hardware.reserved_bytes

    @property
    def over(self) -> float:
        """Bytes by which `needed` exceeds the memory of a device; below 0 if it fits."""
        return self.needed - self.hardware.memory_bytes

    @property
    def fits(self) -> bool:
        """Whether it fits in the memory of a device."""
        return self.over <= 0

    @property
    def headline(self) -> str:
        """The answer in two lines."""
        memory = f"{size(self.needed)} of {size(self.hardware.memory_bytes)}"
        fit = f"fits in memory ({memory})" if self.fits else f"out of memory: {memory}, {size(self.over)} too much"
        return (
            f"{self.model} ({count(self.parameters)} parameters) on {self.dp * self.tp:,} x {self.hardware.name}, "
            f"tp={self.tp} x dp={self.dp}: {fit}\n"
            f"{seconds(self.time.step)} per step of {self.tokens:,} {self.unit}: {self.tokens_per_s_per_device:,.0f} {self.unit}/s per device, "
            f"{self.tokens_per_s:,.0f} in total, MFU {self.mfu:.1%}"
        )

    def to_json(self) -> str:
        """Return all of it, and what follows from it, as JSON: bytes, seconds, FLOPs. "tokens" in names is "samples" if the inputs have none."""
        values: Any = asdict(replace(self, traced=None))
        del values["traced"]
        values[self.unit] = values.pop("tokens")
        values |= {self.unit + rate: getattr(self, "tokens" + rate) for rate in ("_per_s", "_per_s_per_device")}
        values |= {name: getattr(self, name) for name in ("mfu", "needed", "fits")}
        values["memory"]["peak"]["total"] = self.memory.peak.total
        return json.dumps(values, indent=1)

    def tables(self) -> list[Table]:
        """Return all tables that are shown."""
        return [self._held_table(), self._peak_table(), self._collectives_table(), self._time_table()]

    def _held_table(self) -> Table:
        rows: list[tuple[str, ...]] = [
            (name, size(getattr(self.memory, name))) for name in ("parameters", "gradients", "optimizer", "buffers")
        ]
        rows += [(f"saved activations: {kind}", size(n)) for kind, n in _largest_first(self.memory.activations)]
        return Table("Memory held by a rank", ("", "bytes"), rows, (1,))

    def _peak_table(self) -> Table:
        peak = self.memory.peak
        rows: list[tuple[str, ...]] = [(kind, size(n), share(n, peak.total)) for kind, n in _largest_first(peak.kinds)]
        rows.append(("total", size(peak.total), "100%"))
        rows.append(("with allocator overhead", size(self.needed), f"of {size(self.hardware.memory_bytes)}"))
        return Table(f"Peak memory of a rank, in the {peak.name}", ("", "bytes", ""), rows, (1, 2))

    def _collectives_table(self) -> Table:
        counts: Counter[tuple[str, str, int]] = Counter()
        sizes: Counter[tuple[str, str, int]] = Counter()
        for c in self.collectives:
            counts[c.axis, c.kind, c.ranks] += c.count
            sizes[c.axis, c.kind, c.ranks] += c.count * c.bytes
        rows: list[tuple[str, ...]] = [
            (axis, kind, str(n), f"{counts[axis, kind, n]:,}", size(sizes[axis, kind, n])) for axis, kind, n in sorted(counts)
        ]
        return Table("Collectives of a step", ("axis", "kind", "ranks", "count", "bytes"), rows, (2, 3, 4))

    def _time_table(self) -> Table:
        t = self.time
        rows: list[tuple[str, ...]] = [
            ("matmuls (GEMMs)", seconds(t.products)),
            ("attention", seconds(t.attention)),
            ("other kernels", seconds(t.other)),
            ("TP communication (not overlapped)", seconds(t.tp)),
            ("exposed FSDP2 communication", f"{seconds(t.dp_exposed)} of {seconds(t.dp)}"),
            ("kernels slowed by FSDP2 communication", seconds(t.slowed)),
            ("CPU launch overhead", seconds(t.host)),
            ("optimizer", seconds(t.optimizer)),
            ("step", seconds(t.step)),
            ("step without overlap", seconds(t.without_overlap)),
        ]
        return Table("Time", ("", "seconds"), rows, (1,))

    def __str__(self) -> str:
        lines = [self.headline, self.plan]
        for t in self.tables():
            lines += ["", t.caption, table(t.header, t.rows, right=t.right)]
        lines += ["", "Assumed:", *(f"  - {a}" for a in self.assumptions)]
        return "\n".join(lines)


def _largest_first(kinds: Any) -> list[tuple[str, int]]:
    return sorted(kinds.items(), key=lambda item: -item[1])
