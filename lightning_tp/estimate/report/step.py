"""Hold what was predicted for one rank of a mesh, and show it as a table and JSON."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from lightning_tp.core.units import count, seconds, share, size
from lightning_tp.estimate.cost.collectives import Collective
from lightning_tp.estimate.cost.flops import Flops, Product
from lightning_tp.estimate.cost.hardware import Hardware
from lightning_tp.estimate.cost.memory import Memory
from lightning_tp.estimate.cost.roofline import Time
from lightning_tp.plan.table import columns

if TYPE_CHECKING:
    from lightning_tp.estimate.rank.rank_model import RankModel
    from lightning_tp.plan.plan import Plan

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


@dataclass(frozen=True)
class StepReport:
    """A step of training on one rank of `dp` x `tp`, as `lightning_tp.Estimate` has it; `str()` of it is a table.

    Args:
        model: its class.
        parameters: of the whole model, and `held` of them on a rank.
        dp, tp: the mesh.
        batch: samples of a data-parallel rank and micro-batch.
        tokens: of all ranks in one optimizer step (samples, where the inputs have no tokens).
        accumulate: micro-batches of a step.
        precision, optimizer, activation_checkpointing: as asked for.
        hardware: what the times are for.
        memory: bytes on a rank.
        collectives: of an optimizer step.
        products: the matrix products of a micro-batch on a rank.
        flops: of a micro-batch.
        time: seconds of a step.
        plan: how the model is split, in a line.
        assumptions: all that the numbers rest on.
        unit: "tokens", or "samples" where the inputs have none: what `tokens` and the rates count.
        traced: the plan, the trace of a rank, and that of the whole model, for pictures; not in JSON.
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
    traced: tuple[Plan, RankModel, RankModel] | None = field(default=None, compare=False, repr=False)

    @property
    def tokens_per_s(self) -> float:
        """Of all ranks."""
        return self.tokens / self.time.step

    @property
    def tokens_per_s_per_device(self) -> float:
        """Of one."""
        return self.tokens_per_s / (self.dp * self.tp)

    @property
    def mfu(self) -> float:
        """Model FLOP/s as a share of the peak of all devices, from 0 to 1."""
        done = self.flops.model * self.dp * self.accumulate
        return done / (self.time.step * self.dp * self.tp * self.peak_flops)

    @property
    def needed(self) -> float:
        """Bytes that a device needs: the peak, what the allocator can't use, and what is taken before."""
        return self.memory.peak.total * (1 + self.hardware.fragmentation) + self.hardware.reserved_bytes

    @property
    def over(self) -> float:
        """Bytes by which that is more than a device has; below 0 where it fits."""
        return self.needed - self.hardware.memory_bytes

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.over <= 0

    def to_json(self) -> str:
        """All of it, and what follows from it; bytes, seconds, FLOPs. Where the inputs have no tokens, it says "samples" for "tokens"."""
        values: Any = _jsonable(self)
        values[self.unit] = values.pop("tokens")
        values |= {self.unit + rate: getattr(self, "tokens" + rate) for rate in ("_per_s", "_per_s_per_device")}
        values |= {name: getattr(self, name) for name in ("mfu", "needed", "fits")}
        values["memory"]["peak"]["total"] = self.memory.peak.total
        return json.dumps(values, indent=1)

    def tables(self) -> list[Table]:
        """(title, column names, rows) of all that is shown."""
        m, t = self.memory, self.time
        memory: list[tuple[str, ...]] = [
            (kind, size(n), share(n, m.peak.total)) for kind, n in sorted(m.peak.kinds.items(), key=lambda x: -x[1])
        ]
        memory.append(("together", size(m.peak.total), "100%"))
        memory.append(("on a device, with what can't be used", size(self.needed), f"of {size(self.hardware.memory_bytes)}"))
        kept: list[tuple[str, ...]] = [
            (f"kept for the backward: {kind}", size(n), "") for kind, n in sorted(m.activations.items(), key=lambda x: -x[1])
        ]
        held: list[tuple[str, ...]] = [
            ("parameters", size(m.parameters), ""),
            ("gradients", size(m.gradients), ""),
            ("optimizer", size(m.optimizer), ""),
            ("buffers", size(m.buffers), ""),
        ]
        by: Counter[tuple[str, str, int]] = Counter()
        sent: Counter[tuple[str, str, int]] = Counter()
        for c in self.collectives:
            by[c.axis, c.kind, c.ranks] += c.count
            sent[c.axis, c.kind, c.ranks] += c.count * c.bytes
        moved: list[tuple[str, ...]] = [
            (axis, kind, str(n), f"{by[axis, kind, n]:,}", size(sent[axis, kind, n])) for axis, kind, n in sorted(by)
        ]
        times: list[tuple[str, ...]] = [
            ("matrix products", seconds(t.products)),
            ("attention", seconds(t.attention)),
            ("other kernels", seconds(t.other)),
            ("collectives on the tensor-parallel axis", seconds(t.tp)),
            ("FSDP2's collectives that nothing hides", f"{seconds(t.dp_exposed)} of {seconds(t.dp)}"),
            ("kernels slowed by FSDP2's collectives beside them", seconds(t.slowed)),
            ("waiting for the host", seconds(t.host)),
            ("optimizer", seconds(t.optimizer)),
            ("a step", seconds(t.step)),
            ("a step, nothing overlapping", seconds(t.without_overlap)),
        ]
        return [
            ("Memory of a rank, held", ("", "bytes", ""), held + kept),
            (f"Memory of a rank at its peak: {m.peak.name}", ("", "bytes", ""), memory),
            ("Collectives of a step", ("axis", "kind", "ranks", "count", "bytes"), moved),
            ("Time", ("", "seconds"), times),
        ]

    @property
    def headline(self) -> str:
        """The answer in two lines."""
        fit = (
            f"fits in {self.hardware.name} ({size(self.needed)} of {size(self.hardware.memory_bytes)})"
            if self.fits
            else f"does NOT fit in {self.hardware.name}: {size(self.needed)}, {size(self.over)} too much"
        )
        return (
            f"{self.model} ({count(self.parameters)} parameters) on {self.dp * self.tp:,} x {self.hardware.name}, "
            f"tp={self.tp} x dp={self.dp}: {fit}\n"
            f"{seconds(self.time.step)} a step of {self.tokens:,} {self.unit}: {self.tokens_per_s_per_device:,.0f} {self.unit}/s on a device, "
            f"{self.tokens_per_s:,.0f} on all, MFU {self.mfu:.1%}"
        )

    def __str__(self) -> str:
        lines = [self.headline, self.plan]
        for title, names, rows in self.tables():
            lines += ["", title]
            table = [names, *rows] if any(names[:1]) else rows
            lines += columns(table, left={0, 1} if len(names) > 3 else {0})
        lines += ["", "Assumed:", *(f"  - {a}" for a in self.assumptions)]
        return "\n".join(lines)


def _jsonable(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _jsonable(getattr(value, f.name)) for f in fields(value) if f.name != "traced"}
    if isinstance(value, dict):
        return {k: _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    return value
