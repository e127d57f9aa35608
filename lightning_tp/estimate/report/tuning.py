"""The result of `tune` as a table and as plain data."""

from __future__ import annotations

import json
from dataclasses import dataclass

from lightning_tp.core.units import seconds, size
from lightning_tp.estimate.report.step import StepReport
from lightning_tp.plan.table import columns


@dataclass(frozen=True)
class Refused:
    """Something that is not possible.

    Args:
        what: the choice, or a group of them.
        why: in words, with the numbers.
    """

    what: str
    why: str


@dataclass(frozen=True)
class TuningReport:
    """What there is to choose from.

    Args:
        fits: the fastest first.
        refused: what is not possible, and why.
        global_batch: samples of an optimizer step.
        gpus: devices.
    """

    fits: tuple[StepReport, ...]
    refused: tuple[Refused, ...]
    global_batch: int
    gpus: int

    def to_json(self) -> str:
        """All choices with their main numbers, and what is refused."""
        names = ("tp", "dp", "batch", "accumulate", "activation_checkpointing", "precision", "needed")
        fits = [
            {n: getattr(e, n) for n in names} | {f"{e.unit}_per_s": e.tokens_per_s, "mfu": e.mfu, "step_s": e.time.step}
            for e in self.fits
        ]
        refused = [{"what": r.what, "why": r.why} for r in self.refused]
        return json.dumps({"gpus": self.gpus, "global_batch": self.global_batch, "fits": fits, "refused": refused}, indent=1)

    def __str__(self) -> str:
        head = f"{len(self.fits)} choices fit on {self.gpus} devices at {self.global_batch} samples a step"
        unit = self.fits[0].unit if self.fits else "tokens"
        rows = [("", "tp", "dp", "batch", "accumulate", "checkpointing", "precision", "memory", "step", f"{unit}/s/device", "MFU")]
        for i, e in enumerate(self.fits, 1):
            rows.append(
                (
                    str(i),
                    str(e.tp),
                    str(e.dp),
                    str(e.batch),
                    str(e.accumulate),
                    e.activation_checkpointing,
                    e.precision,
                    size(e.needed),
                    seconds(e.time.step),
                    f"{e.tokens_per_s_per_device:,.0f}",
                    f"{e.mfu:.1%}",
                )
            )
        lines = [head, *columns(rows, left=())]
        if self.refused:
            lines += ["", "Not possible:", *(f"  {r.what}: {r.why}" for r in self.refused)]
        return "\n".join(lines)
